//! todo
/// placeholder
#[derive(Debug)]
pub struct HashLog;
