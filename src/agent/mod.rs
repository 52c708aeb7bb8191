//! (to be written)
pub mod control_socket;
