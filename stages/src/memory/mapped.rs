//! Memory mapped into this process.
/// placeholder
#[derive(Debug)]
pub struct MappedMemory;
