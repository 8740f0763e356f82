//! A batch whose pages are encoded, before a dialect frames it.

use std::ops::Range;

use super::{Batch, PageEncoding};
use crate::pool::PooledBuffer;

/// A batch whose pages are encoded.
#[derive(Debug)]
pub struct EncodedBatch {
    /// Which pages are sent: those that the destination holds already are not in the mask, which may be 0.
    pub batch: Batch,
    /// Those of the batch's mask that are all zero.
    pub zero: u64,
    /// For each page of the mask that is not zero, lowest first: its encoding, and where its bytes lie in the payload. The bytes
    /// follow each other without a gap. A group's bytes belong to its first page, and the others have none.
    pub pages: Vec<(PageEncoding, Range<u32>)>,
    /// The bytes of the pages; `None` if there are none. Where all pages are raw, it is the buffer that the zero detector filled.
    pub payload: Option<PooledBuffer>,
    /// The [`page_hash`](super::page_hash) of each of `pages`, whatever its encoding. Empty where they are not computed.
    pub hashes: Vec<u64>,
}
