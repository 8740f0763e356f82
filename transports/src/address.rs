//! Addresses.
/// placeholder
#[derive(Debug, Clone)]
pub struct Address;
/// placeholder
#[derive(Debug, Clone)]
pub struct AddressError;
