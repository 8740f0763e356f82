//! todo
/// placeholder
#[derive(Debug)]
pub struct UserfaultLog;
