//! A guest and a link in virtual time. The [simulation](crate::controller::simulation) of a migration and the pair of both
//! courses (`migration/pair`) run on them.
//!
//! Both agree on when bytes have left a link ([`link`]), on which pages a guest has written between two moments of its own
//! time, and on how a throttle slows that time ([`guest`]). A simulation moves a whole round at once, and sees how many
//! pages there are; the pair moves each batch and message, and sees which pages there are and what they contain.

pub mod guest;
pub mod link;
