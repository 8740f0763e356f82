//! todo
/// placeholder
#[derive(Debug)]
pub struct SoftwareLog;
