//! Keys and sealing: AES-256-GCM under one data key an order, which a master key wraps.
//!
//! A sealed text is a version byte, a random nonce of 12 bytes, the ciphertext and its tag of 16 bytes. Where it belongs is
//! authenticated with it, so that it opens in its own place only.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::fmt;

use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{Engine, alphabet};
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

const VERSION: u8 = 1;
const KEY: usize = 32;
const NONCE: usize = 12;
const TAG: usize = 16;
const HEADER: usize = 1 + NONCE;

/// Base64 with or without padding: `openssl rand -base64 32` pads, other tools do not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Why a key file cannot be used. Names lines, never what is on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Only blank lines and comments.
    #[error("no master key given")]
    Empty,
    /// Neither form of a key.
    #[error("line {0} of the master keys is neither 64 hexadecimal digits nor base64 of 32 bytes")]
    Malformed(usize),
    /// The key stands on an earlier line, too.
    #[error("line {0} of the master keys repeats an earlier key")]
    Repeated(usize),
}

/// Why something cannot be sealed or opened. Never holds a key or a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VaultError {
    /// Too short, or of the wrong length, to be one of ours.
    #[error("sealed text is malformed")]
    Malformed,
    /// Sealed by a version of the extension that this one does not know.
    #[error("sealed text has the unknown version {0}")]
    UnknownVersion(u8),
    /// Damaged, moved from another place, or sealed under another key.
    #[error("sealed text is not authentic")]
    NotAuthentic,
    /// More than AES-GCM can seal in one piece.
    #[error("text is too large to be sealed")]
    TooLarge,
    /// The operating system gave no random bytes.
    #[error("no random bytes from the operating system")]
    NoRandom,
}

/// A key on the heap, where moving its owner leaves no copy behind.
struct Secret(Box<[u8; KEY]>);

impl Secret {
    fn empty() -> Self {
        Secret(Box::new([0; KEY]))
    }

    /// A key for one purpose: what is done with it tells nothing about the keys for others.
    fn derive(&self, purpose: &[u8]) -> Secret {
        let mut derived = Secret::empty();
        let mut code = hmac(&self.0, &[purpose]);
        derived.0.copy_from_slice(&code);
        code.zeroize();
        derived
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The master keys of a server: the current one, which wraps, and older ones, which still unwrap.
pub struct MasterKeys(Vec<MasterKey>);

impl MasterKeys {
    /// Reads what a key file or a key command gave: one key a line, the current one first. Blank lines and lines that begin
    /// with `#` do not count.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let mut keys: Vec<MasterKey> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let key = MasterKey::new(&read_key(line).ok_or(KeyError::Malformed(number))?);
            if keys.iter().any(|earlier| earlier.id == key.id) {
                return Err(KeyError::Repeated(number));
            }
            keys.push(key);
        }
        if keys.is_empty() {
            Err(KeyError::Empty)
        } else {
            Ok(MasterKeys(keys))
        }
    }

    /// The key that wraps new data keys.
    pub fn current(&self) -> &MasterKey {
        // `parse` makes no empty list.
        &self.0[0]
    }

    /// The ids of all, the current one first.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.all().map(MasterKey::id)
    }

    /// All of them, the current one first.
    pub fn all(&self) -> impl Iterator<Item = &MasterKey> {
        self.0.iter()
    }

    /// The key of that id, current or older.
    pub fn get(&self, id: &str) -> Option<&MasterKey> {
        self.0.iter().find(|key| key.id == id)
    }
}

impl fmt::Debug for MasterKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0).finish()
    }
}

fn read_key(line: &str) -> Option<Secret> {
    let mut key = Secret::empty();
    if line.len() == 2 * KEY {
        hex::decode_to_slice(line, key.0.as_mut_slice()).ok()?;
        return Some(key);
    }
    // The decoder asks for room for whole groups of three bytes.
    let mut room = Zeroizing::new([0; KEY + 4]);
    if !(43..=44).contains(&line.len()) || BASE64.decode_slice(line, room.as_mut_slice()).ok()? != KEY {
        return None;
    }
    key.0.copy_from_slice(&room[..KEY]);
    Some(key)
}

/// One master key, known to the outside by its id.
pub struct MasterKey {
    id: String,
    wrapping: Secret,
    audit: Secret,
}

impl MasterKey {
    fn new(key: &Secret) -> Self {
        let digest = Sha256::new()
            .chain_update(b"amazon_pii master key id\0")
            .chain_update(key.0.as_slice())
            .finalize();
        MasterKey {
            id: hex::encode(&digest[..8]),
            wrapping: key.derive(b"amazon_pii wraps data keys v1"),
            audit: key.derive(b"amazon_pii signs audit rows v1"),
        }
    }

    /// 16 hexadecimal digits that name the key and tell nothing about it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// HMAC-SHA-256 for rows of the audit log; `context` says what kind of message it is.
    pub fn mac(&self, context: &[u8], message: &[u8]) -> [u8; 32] {
        let length = (context.len() as u64).to_be_bytes();
        hmac(&self.audit.0, &[&length, context, message])
    }

    /// What signs lines of a file for a while: it can do nothing else, so that the master key need not be kept.
    pub fn signer(&self) -> Signer {
        Signer {
            id: self.id.clone(),
            secret: self.audit.derive(b"amazon_pii signs tombstones v1"),
        }
    }
}

/// See [`MasterKey::signer`].
pub struct Signer {
    id: String,
    secret: Secret,
}

impl Signer {
    /// The id of the master key that it comes from.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// HMAC-SHA-256; `context` says what kind of message it is.
    pub fn mac(&self, context: &[u8], message: &[u8]) -> [u8; 32] {
        let length = (context.len() as u64).to_be_bytes();
        hmac(&self.secret.0, &[&length, context, message])
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MasterKey")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Where a wrapped data key belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyBinding<'a> {
    /// Name of the policy.
    pub policy: &'a str,
    /// Key of the order.
    pub order_key: &'a str,
    /// Id of the data key.
    pub key_id: &'a str,
}

impl KeyBinding<'_> {
    fn bytes(&self) -> Vec<u8> {
        associated(
            b"amazon_pii data key",
            [self.policy, self.order_key, self.key_id].map(str::as_bytes),
        )
    }
}

/// Where a sealed document belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding<'a> {
    /// Name of the policy.
    pub policy: &'a str,
    /// Key of the order.
    pub order_key: &'a str,
    /// Table of the record.
    pub table: &'a str,
    /// Key of the record.
    pub record_key: &'a str,
    /// Version of the document.
    pub version: i64,
    /// Id of the data key.
    pub key_id: &'a str,
}

impl Binding<'_> {
    fn bytes(&self) -> Vec<u8> {
        let version = self.version.to_be_bytes();
        let [policy, order, table, record, key] =
            [self.policy, self.order_key, self.table, self.record_key, self.key_id].map(str::as_bytes);
        associated(b"amazon_pii document", [policy, order, table, record, &version, key])
    }
}

/// Each part after its length, so that no two lists of parts make the same bytes.
fn associated<const N: usize>(domain: &[u8], parts: [&[u8]; N]) -> Vec<u8> {
    let room = parts.iter().fold(1 + 8 + domain.len(), |n, part| n + 8 + part.len());
    let mut out = Vec::with_capacity(room);
    out.push(VERSION);
    for part in std::iter::once(domain).chain(parts) {
        out.extend((part.len() as u64).to_be_bytes());
        out.extend(part);
    }
    out
}

/// The key of one order's documents.
pub struct DataKey(Secret);

impl DataKey {
    /// A new random key.
    pub fn generate() -> Result<Self, VaultError> {
        let mut key = Secret::empty();
        getrandom::fill(key.0.as_mut_slice()).map_err(|_| VaultError::NoRandom)?;
        Ok(DataKey(key))
    }

    /// The key sealed under a master key, to be stored.
    pub fn wrap(&self, master: &MasterKey, owner: &KeyBinding<'_>) -> Result<Vec<u8>, VaultError> {
        seal(&master.wrapping, &owner.bytes(), self.0.0.as_slice())
    }

    /// Opens what [`wrap`](Self::wrap) made with the same master key for the same owner.
    pub fn unwrap(wrapped: &[u8], master: &MasterKey, owner: &KeyBinding<'_>) -> Result<Self, VaultError> {
        let plain = open(&master.wrapping, &owner.bytes(), wrapped)?;
        let mut key = Secret::empty();
        if plain.len() != KEY {
            return Err(VaultError::Malformed);
        }
        key.0.copy_from_slice(&plain);
        Ok(DataKey(key))
    }

    /// Seals a document for its place.
    pub fn seal(&self, binding: &Binding<'_>, plain: &[u8]) -> Result<Vec<u8>, VaultError> {
        seal(&self.0, &binding.bytes(), plain)
    }

    /// Opens what [`seal`](Self::seal) made for the same place.
    pub fn open(&self, binding: &Binding<'_>, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, VaultError> {
        open(&self.0, &binding.bytes(), sealed)
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey")
    }
}

/// Nonces from the operating system, many at a time: asking costs as much as sealing. A process of the server's begins
/// without any, so that no two share some: its parent, the postmaster, seals nothing.
struct Nonces {
    drawn: [u8; 256 * NONCE],
    /// How many bytes of them are used up.
    used: usize,
}

thread_local! {
    static NONCES: RefCell<Nonces> = const { RefCell::new(Nonces { drawn: [0; 256 * NONCE], used: 256 * NONCE }) };
}

impl Nonces {
    fn next(&mut self) -> Result<[u8; NONCE], VaultError> {
        if self.used == self.drawn.len() {
            getrandom::fill(&mut self.drawn).map_err(|_| VaultError::NoRandom)?;
            self.used = 0;
        }
        let mut nonce = [0; NONCE];
        nonce.copy_from_slice(&self.drawn[self.used..self.used + NONCE]);
        self.used += NONCE;
        Ok(nonce)
    }
}

fn seal(key: &Secret, associated: &[u8], plain: &[u8]) -> Result<Vec<u8>, VaultError> {
    let nonce = NONCES.with_borrow_mut(Nonces::next)?;
    // All the room at once: a buffer that moved would leave plaintext behind.
    let mut out = Vec::with_capacity(HEADER + plain.len() + TAG);
    out.push(VERSION);
    out.extend(nonce);
    out.extend_from_slice(plain);
    let cipher = Aes256Gcm::new((&*key.0).into());
    match cipher.encrypt_inout_detached((&nonce).into(), associated, out[HEADER..].as_mut().into()) {
        Ok(tag) => out.extend_from_slice(&tag),
        Err(_) => {
            out.zeroize();
            return Err(VaultError::TooLarge);
        }
    }
    Ok(out)
}

fn open(key: &Secret, associated: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    let (&version, rest) = sealed.split_first().ok_or(VaultError::Malformed)?;
    if version != VERSION {
        return Err(VaultError::UnknownVersion(version));
    }
    let (nonce, rest) = rest.split_first_chunk::<NONCE>().ok_or(VaultError::Malformed)?;
    let (text, tag) = rest.split_last_chunk::<TAG>().ok_or(VaultError::Malformed)?;
    let mut plain = Zeroizing::new(text.to_vec());
    Aes256Gcm::new((&*key.0).into())
        .decrypt_inout_detached(nonce.into(), associated, plain.as_mut_slice().into(), tag.into())
        .map_err(|_| VaultError::NotAuthentic)?;
    Ok(plain)
}

fn hmac(key: &[u8; KEY], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(key).expect("HMAC takes keys of every length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}
