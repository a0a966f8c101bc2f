//! Results: rows of text, as their types' output functions write them.

use std::ffi::CStr;
use std::ops::Deref;
use std::rc::Rc;

use pgrx::pg_sys;

use super::error::{Error, Result};
use super::size::{self, LONGEST};

/// The values of a result, one after the other: a statement's rows share two buffers.
#[derive(Debug, Default)]
struct Block {
    columns: usize,
    texts: String,
    bytes: Vec<u8>,
    cells: Vec<Cell>,
}

/// Where a value is.
#[derive(Debug, Clone, Copy)]
enum Cell {
    Null,
    Text { from: usize, to: usize },
    Bytes { from: usize, to: usize },
}

/// One result row.
#[derive(Debug, Clone)]
pub struct Row {
    block: Rc<Block>,
    first: usize,
}

/// A text that shares its memory with the result that it came with, as cheap to copy as a number.
#[derive(Clone)]
pub struct Text {
    block: Rc<Block>,
    from: usize,
    to: usize,
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        let to = text.len();
        let block = Block {
            texts: text,
            ..Block::default()
        };
        Self {
            block: Rc::new(block),
            from: 0,
            to,
        }
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.block.texts[self.from..self.to]
    }
}

impl AsRef<str> for Text {
    fn as_ref(&self) -> &str {
        self
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Text {}

impl std::fmt::Debug for Text {
    /// It may be personal data.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("<withheld>")
    }
}

impl Row {
    fn cell(&self, i: usize) -> Option<Cell> {
        let cell = || self.block.cells.get(self.first + i).copied();
        (i < self.block.columns).then(cell).flatten()
    }

    /// The text form of column `i`, or `None` for NULL.
    ///
    /// # Errors
    /// The column does not exist or holds bytes.
    pub fn text(&self, i: usize) -> Result<Option<&str>> {
        match self.cell(i) {
            Some(Cell::Null) => Ok(None),
            Some(Cell::Text { from, to }) => Ok(Some(&self.block.texts[from..to])),
            _ => Err(Error::internal("a result column is missing or is no text")),
        }
    }

    /// The text form of a column that is never NULL.
    ///
    /// # Errors
    /// As [`Row::text`], or the column is NULL.
    pub fn str(&self, i: usize) -> Result<&str> {
        self.text(i)?
            .ok_or_else(|| Error::internal("a result column is unexpectedly null"))
    }

    /// [`Row::text`], owned.
    ///
    /// # Errors
    /// As [`Row::text`].
    pub fn owned(&self, i: usize) -> Result<Option<String>> {
        Ok(self.text(i)?.map(str::to_owned))
    }

    /// [`Row::str`], owned.
    ///
    /// # Errors
    /// As [`Row::str`].
    pub fn string(&self, i: usize) -> Result<String> {
        Ok(self.str(i)?.to_owned())
    }

    /// [`Row::text`], shared with the row.
    ///
    /// # Errors
    /// As [`Row::text`].
    pub fn shared_or_null(&self, i: usize) -> Result<Option<Text>> {
        match self.cell(i) {
            Some(Cell::Null) => Ok(None),
            Some(Cell::Text { from, to }) => Ok(Some(Text {
                block: self.block.clone(),
                from,
                to,
            })),
            _ => Err(Error::internal("a result column is missing or is no text")),
        }
    }

    /// [`Row::str`], shared with the row.
    ///
    /// # Errors
    /// As [`Row::str`].
    pub fn shared(&self, i: usize) -> Result<Text> {
        self.shared_or_null(i)?
            .ok_or_else(|| Error::internal("a result column is unexpectedly null"))
    }

    /// A number of at most 64 bits.
    ///
    /// # Errors
    /// As [`Row::str`], or it is no integer.
    pub fn int(&self, i: usize) -> Result<i64> {
        self.str(i)?
            .parse()
            .map_err(|_| Error::internal("a result column is no integer"))
    }

    /// A boolean; NULL is false.
    ///
    /// # Errors
    /// As [`Row::text`].
    pub fn bool(&self, i: usize) -> Result<bool> {
        Ok(self.text(i)? == Some("t"))
    }

    /// An object identifier.
    ///
    /// # Errors
    /// As [`Row::int`].
    pub fn oid(&self, i: usize) -> Result<pg_sys::Oid> {
        let number = u32::try_from(self.int(i)?).map_err(|_| Error::internal("a result column is no OID"))?;
        Ok(pg_sys::Oid::from(number))
    }

    /// Binary data of a column of type bytea, see [`Want::Bytes`].
    ///
    /// # Errors
    /// The column is missing, NULL or was not fetched as bytes.
    pub fn bytes(&self, i: usize) -> Result<&[u8]> {
        match self.cell(i) {
            Some(Cell::Bytes { from, to }) => Ok(&self.block.bytes[from..to]),
            _ => Err(Error::internal("a result column holds no bytes")),
        }
    }

    /// All columns from `first` on, as text.
    ///
    /// # Errors
    /// As [`Row::text`].
    pub fn texts(&self, range: std::ops::Range<usize>) -> Result<Vec<Option<String>>> {
        range.map(|i| self.owned(i)).collect()
    }
}

impl PartialEq for Row {
    fn eq(&self, other: &Self) -> bool {
        let columns = self.block.columns;
        columns == other.block.columns
            && (0..columns).all(|i| match (self.cell(i), other.cell(i)) {
                (Some(Cell::Bytes { .. }), Some(Cell::Bytes { .. })) => self.bytes(i).ok() == other.bytes(i).ok(),
                _ => matches!((self.text(i), other.text(i)), (Ok(a), Ok(b)) if a == b),
            })
    }
}

impl Eq for Row {}

/// How columns of type bytea come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// As the output function writes them: for rows of the user's.
    Text,
    /// Raw: for sealed documents of our own.
    Bytes,
}

/// What the output functions of these types write can be said without calling them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Int2,
    Int4,
    Int8,
    Oid,
    Bool,
    /// text and varchar: the value itself.
    Text,
    /// bytea, as bytes.
    Bytes,
    Other,
}

/// How a result column leaves.
struct Output {
    form: Form,
    function: pg_sys::FmgrInfo,
    /// How many characters a byte becomes, for types whose size tells how long their text is.
    digits: Option<usize>,
}

impl Output {
    /// # Safety
    /// `desc` is the descriptor of the current SPI result, `n` one of its columns.
    unsafe fn of(desc: pg_sys::TupleDesc, n: usize, want: Want) -> Self {
        // SAFETY: the caller's; the function is looked up into a zeroed struct of our own and lives in the SPI context.
        unsafe {
            let oid = pg_sys::SPI_gettypeid(desc, n as i32);
            let form = match oid {
                pg_sys::INT2OID => Form::Int2,
                pg_sys::INT4OID => Form::Int4,
                pg_sys::INT8OID => Form::Int8,
                pg_sys::OIDOID => Form::Oid,
                pg_sys::BOOLOID => Form::Bool,
                pg_sys::TEXTOID | pg_sys::VARCHAROID => Form::Text,
                pg_sys::BYTEAOID if want == Want::Bytes => Form::Bytes,
                _ => Form::Other,
            };
            let mut function = std::mem::zeroed::<pg_sys::FmgrInfo>();
            if form == Form::Other {
                let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
                pg_sys::getTypeOutputInfo(oid, &mut output, &mut is_varlena);
                pg_sys::fmgr_info(output, &mut function);
            }
            Self {
                form,
                function,
                digits: size::digits(oid).filter(|_| form != Form::Bytes),
            }
        }
    }

    /// # Safety
    /// `value` is a value of the column that this is of, which is column `n` of `desc`.
    unsafe fn add(&mut self, block: &mut Block, value: pg_sys::Datum, desc: pg_sys::TupleDesc, n: usize) -> Result<()> {
        use std::fmt::Write;
        let from = block.texts.len();
        // Writing to a String cannot fail.
        let _ = match self.form {
            Form::Int2 => write!(block.texts, "{}", value.value() as i16),
            Form::Int4 => write!(block.texts, "{}", value.value() as i32),
            Form::Int8 => write!(block.texts, "{}", value.value() as i64),
            Form::Oid => write!(block.texts, "{}", value.value() as u32),
            Form::Bool => block.texts.write_str(if value.value() as u8 != 0 { "t" } else { "f" }),
            Form::Text | Form::Bytes | Form::Other => {
                // SAFETY: the caller's.
                return unsafe { self.add_varlena(block, value, desc, n) };
            }
        };
        block.cells.push(Cell::Text {
            from,
            to: block.texts.len(),
        });
        Ok(())
    }

    /// # Safety
    /// As for [`Output::add`].
    unsafe fn add_varlena(
        &mut self,
        block: &mut Block,
        value: pg_sys::Datum,
        desc: pg_sys::TupleDesc,
        n: usize,
    ) -> Result<()> {
        // SAFETY: the caller's; what is detoasted, or what the output function allocates, is freed right here or with the
        // SPI session.
        unsafe {
            if let Some(digits) = self.digits
                && !size::fits(value, digits)
            {
                return Err(size::too_large(desc, n as i32));
            }
            if self.form == Form::Other {
                let printed = pg_sys::OutputFunctionCall(&mut self.function, value);
                let taken = block.add_text(CStr::from_ptr(printed).to_bytes(), desc, n);
                pg_sys::pfree(printed.cast());
                return taken;
            }
            let stored = value.cast_mut_ptr::<pg_sys::varlena>();
            let plain = if pgrx::varatt_is_4b_u(stored) || (pgrx::varatt_is_1b(stored) && !pgrx::varatt_is_1b_e(stored))
            {
                stored
            } else {
                pg_sys::pg_detoast_datum_packed(stored)
            };
            let bytes = pgrx::varlena::varlena_to_byte_slice(plain);
            let taken = if self.form == Form::Bytes {
                let from = block.bytes.len();
                block.bytes.extend_from_slice(bytes);
                block.cells.push(Cell::Bytes {
                    from,
                    to: block.bytes.len(),
                });
                Ok(())
            } else {
                block.add_text(bytes, desc, n)
            };
            if plain != stored {
                pg_sys::pfree(plain.cast());
            }
            taken
        }
    }
}

impl Block {
    /// # Safety
    /// Column `n` of `desc`, which belongs to the current SPI result.
    unsafe fn add_text(&mut self, bytes: &[u8], desc: pg_sys::TupleDesc, n: usize) -> Result<()> {
        if bytes.len() >= LONGEST {
            // SAFETY: the caller's.
            return Err(unsafe { size::too_large(desc, n as i32) });
        }
        let text = std::str::from_utf8(bytes).map_err(|_| Error::unsupported("a value is not valid UTF-8"))?;
        let from = self.texts.len();
        self.texts.push_str(text);
        self.cells.push(Cell::Text {
            from,
            to: self.texts.len(),
        });
        Ok(())
    }
}

/// Reads the current SPI tuple table.
///
/// # Safety
/// Inside an SPI session, right after a statement.
pub(super) unsafe fn read(want: Want) -> Result<Vec<Row>> {
    // SAFETY: the caller's; table and descriptor belong to the SPI session; the arrays have one entry a column.
    unsafe {
        let Some(table) = pg_sys::SPI_tuptable.as_ref() else {
            return Ok(Vec::new());
        };
        let count = usize::try_from(pg_sys::SPI_processed).unwrap_or(0);
        if count == 0 {
            return Ok(Vec::new());
        }
        let desc = table.tupdesc;
        let columns = usize::try_from((*desc).natts).unwrap_or(0);
        let mut outputs: Vec<Output> = (1..=columns).map(|n| Output::of(desc, n, want)).collect();
        let mut values = vec![pg_sys::Datum::from(0); columns];
        let mut nulls = vec![false; columns];
        let mut block = Block {
            columns,
            cells: Vec::with_capacity(count * columns),
            ..Block::default()
        };
        for i in 0..count {
            pg_sys::heap_deform_tuple(*table.vals.add(i), desc, values.as_mut_ptr(), nulls.as_mut_ptr());
            for (n, output) in outputs.iter_mut().enumerate() {
                if nulls[n] {
                    block.cells.push(Cell::Null);
                } else {
                    output.add(&mut block, values[n], desc, n + 1)?;
                }
            }
        }
        let block = Rc::new(block);
        Ok((0..count)
            .map(|i| Row {
                block: block.clone(),
                first: i * columns,
            })
            .collect())
    }
}

/// A result row whose values leave one at a time, when they are asked for.
pub struct Lazy<'a> {
    outputs: &'a mut [Output],
    values: &'a [pg_sys::Datum],
    nulls: &'a [bool],
    desc: pg_sys::TupleDesc,
    block: &'a mut Block,
}

impl Lazy<'_> {
    /// The text form of column `i`, or `None` for NULL.
    ///
    /// # Errors
    /// The column does not exist, or its value is too large to travel; errors of the server unwind.
    pub fn text(&mut self, i: usize) -> Result<Option<&str>> {
        let null = self
            .nulls
            .get(i)
            .ok_or_else(|| Error::internal("a result column is missing"))?;
        if *null {
            return Ok(None);
        }
        self.block.texts.clear();
        // A single value that was large does not stay for the rest.
        self.block.texts.shrink_to(1 << 20);
        self.block.cells.clear();
        // SAFETY: made by `each` of a row of the current SPI result.
        unsafe { self.outputs[i].add(self.block, self.values[i], self.desc, i + 1)? };
        Ok(Some(&self.block.texts))
    }

    /// Calls `f` with each row of the current SPI tuple table. What output functions leave behind is freed row by row.
    ///
    /// # Safety
    /// Inside an SPI session, right after a statement.
    pub(super) unsafe fn each(mut f: impl FnMut(&mut Lazy<'_>) -> Result<()>) -> Result<usize> {
        // SAFETY: the caller's; table and descriptor belong to the SPI session, and so does the memory context, which is
        // deleted with it if an error unwinds. `outputs` is made outside of it.
        unsafe {
            let Some(table) = pg_sys::SPI_tuptable.as_ref() else {
                return Ok(0);
            };
            let count = usize::try_from(pg_sys::SPI_processed).unwrap_or(0);
            let desc = table.tupdesc;
            let columns = usize::try_from((*desc).natts).unwrap_or(0);
            let mut outputs: Vec<Output> = (1..=columns).map(|n| Output::of(desc, n, Want::Text)).collect();
            let mut values = vec![pg_sys::Datum::from(0); columns];
            let mut nulls = vec![false; columns];
            let mut block = Block::default();
            let outside = pg_sys::CurrentMemoryContext;
            let inside = pg_sys::AllocSetContextCreateInternal(
                outside,
                c"amazon_pii row".as_ptr(),
                pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
            );
            for i in 0..count {
                pg_sys::heap_deform_tuple(*table.vals.add(i), desc, values.as_mut_ptr(), nulls.as_mut_ptr());
                pg_sys::CurrentMemoryContext = inside;
                let done = f(&mut Lazy {
                    outputs: &mut outputs,
                    values: &values,
                    nulls: &nulls,
                    desc,
                    block: &mut block,
                });
                pg_sys::CurrentMemoryContext = outside;
                pg_sys::MemoryContextReset(inside);
                done?;
            }
            pg_sys::MemoryContextDelete(inside);
            Ok(count)
        }
    }
}
