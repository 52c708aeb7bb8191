//! Real programs at the far end: an SSH server, a web server, a remote desktop.

pub mod nginx;
pub mod sshd;
pub mod xrdp;
