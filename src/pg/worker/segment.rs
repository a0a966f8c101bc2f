//! A piece of memory that a backend shares with one worker: a request goes in, an answer comes out, and numbers while the
//! worker is at it.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

use pgrx::prelude::*;

use super::Handle;

use super::desk;

/// Room for the words of a failure.
const ANSWER_ROOM: usize = 512;

/// Numbers that a worker can tell.
pub const NUMBERS: usize = 3;

#[repr(C)]
struct Header {
    state: AtomicU32,
    request_length: u32,
    answer_length: AtomicU32,
    numbers: [AtomicI64; NUMBERS],
    answer: [u8; ANSWER_ROOM],
    /// Address of the latch of the backend that asks.
    latch: usize,
}

/// What the worker answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Nothing: it never started, or ended before it was done.
    None,
    Done,
    /// It failed, in words that may be shown.
    Failed(String),
    /// It did what it was asked, and the answer is no; why, in a form that both sides know.
    Refused(String),
}

const DONE: u32 = 1;
const FAILED: u32 = 2;
const REFUSED: u32 = 3;

/// A mapped segment; unmapped when dropped, and gone when nobody maps it any more.
#[derive(Debug)]
pub struct Segment(*mut pg_sys::dsm_segment);

impl Segment {
    /// A new segment that holds `request`; `None` when the server has no room for one.
    pub fn create(request: &[u8]) -> Option<Self> {
        let length = u32::try_from(request.len()).ok()?;
        // SAFETY: inside a transaction. The segment is at least as large as header and request, aligned to a page, and
        // nobody else knows it yet.
        unsafe {
            const NULL_IF_FULL: i32 = 1;
            let raw = pg_sys::dsm_create(size_of::<Header>() + request.len(), NULL_IF_FULL);
            if raw.is_null() {
                return None;
            }
            let segment = Self(raw);
            segment.header().write(Header {
                state: AtomicU32::new(0),
                request_length: length,
                answer_length: AtomicU32::new(0),
                numbers: [const { AtomicI64::new(0) }; NUMBERS],
                answer: [0; ANSWER_ROOM],
                latch: desk::my_latch(),
            });
            segment.body().copy_from_nonoverlapping(request.as_ptr(), request.len());
            Some(segment)
        }
    }

    /// Maps the segment that another process created; `None` when that process has already given up.
    pub fn attach(handle: u32) -> Option<Self> {
        // SAFETY: a handle that is no longer known gives NULL.
        let raw = unsafe { pg_sys::dsm_attach(handle) };
        (!raw.is_null()).then(|| Self(raw))
    }

    /// Keeps the segment over the end of the transaction. Whenever it is let go of then, be it because this process ends,
    /// the worker is told to end too.
    pub fn outlive_transactions(&self, worker: &Handle) {
        // SAFETY: mapped until dropped; the handle is freed after the segment, see the callback.
        unsafe {
            pg_sys::dsm_pin_mapping(self.0);
            pg_sys::on_dsm_detach(self.0, Some(end_worker), pg_sys::Datum::from(worker.0));
        }
    }

    /// The numbers so far.
    pub fn numbers(&self) -> [i64; NUMBERS] {
        let header = self.header();
        // SAFETY: mapped until dropped, written before anybody else knew the segment; atomics.
        std::array::from_fn(|i| unsafe { (&(*header).numbers)[i].load(Ordering::Relaxed) })
    }

    /// Tells the numbers so far.
    pub fn tell(&self, numbers: [i64; NUMBERS]) {
        let header = self.header();
        for (i, number) in numbers.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { (&(*header).numbers)[i].store(number, Ordering::Relaxed) };
        }
    }

    /// What another process attaches by.
    pub fn handle(&self) -> u32 {
        // SAFETY: mapped until dropped.
        unsafe { pg_sys::dsm_segment_handle(self.0) }
    }

    fn header(&self) -> *mut Header {
        // SAFETY: mapped until dropped; the address is that of a page.
        unsafe { pg_sys::dsm_segment_address(self.0).cast() }
    }

    fn body(&self) -> *mut u8 {
        // SAFETY: every segment is larger than its header.
        unsafe { self.header().add(1).cast() }
    }

    /// What was asked.
    pub fn request(&self) -> Vec<u8> {
        // SAFETY: request and its length are written once, before the worker is asked for; the length is checked
        // against that of the mapping.
        unsafe {
            let mapped = pg_sys::dsm_segment_map_length(self.0).saturating_sub(size_of::<Header>());
            let length = ((*self.header()).request_length as usize).min(mapped);
            std::slice::from_raw_parts(self.body(), length).to_vec()
        }
    }

    /// The worker's last word, said once; [`Segment::wake`] wakes who waits for it.
    pub fn answer(&self, answer: &Answer) {
        let header = self.header();
        let (state, words) = match answer {
            Answer::None => return,
            Answer::Done => (DONE, ""),
            Answer::Failed(words) => (FAILED, words.as_str()),
            Answer::Refused(why) => (REFUSED, why.as_str()),
        };
        let length = words.floor_char_boundary(ANSWER_ROOM);
        // SAFETY: only the worker writes the answer, and the backend reads it after it has seen the state.
        unsafe {
            (&raw mut (*header).answer)
                .cast::<u8>()
                .copy_from_nonoverlapping(words.as_ptr(), length);
            (*header).answer_length.store(length as u32, Ordering::Relaxed);
            (*header).state.store(state, Ordering::Release);
        }
    }

    /// Wakes who waits for the answer.
    pub fn wake(&self) {
        // SAFETY: written once, before the worker was asked.
        desk::set_latch(unsafe { (*self.header()).latch });
    }

    /// What the worker said.
    pub fn answered(&self) -> Answer {
        let header = self.header();
        // SAFETY: as in `answer`; the length is checked against the room.
        unsafe {
            match (*header).state.load(Ordering::Acquire) {
                DONE => Answer::Done,
                state @ (FAILED | REFUSED) => {
                    let length = ((*header).answer_length.load(Ordering::Relaxed) as usize).min(ANSWER_ROOM);
                    let words = std::slice::from_raw_parts((&raw const (*header).answer).cast::<u8>(), length);
                    let words = String::from_utf8_lossy(words).into_owned();
                    if state == FAILED {
                        Answer::Failed(words)
                    } else {
                        Answer::Refused(words)
                    }
                }
                _ => Answer::None,
            }
        }
    }
}

/// Called when a segment is let go of. A worker that has ended is not told twice: its place in the server's list has
/// moved on.
#[pg_guard]
unsafe extern "C-unwind" fn end_worker(_segment: *mut pg_sys::dsm_segment, handle: pg_sys::Datum) {
    // SAFETY: the handle outlives the segment: whoever has both drops the segment first.
    unsafe { pg_sys::TerminateBackgroundWorker(handle.cast_mut_ptr()) }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped by us; the transaction's end would do it too, but has not come yet.
        unsafe { pg_sys::dsm_detach(self.0) }
    }
}
