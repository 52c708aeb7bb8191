//! culvert as its users meet it: the built binary as separate processes, and real programs around it.
//!
//! Each module tells the stories of one topic; `support` starts the processes and waits for what they do. The programs
//! are Debian packages, which `tests/run` installs. A story never sleeps to let something happen: it waits for what
//! it needs, up to a deadline.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]
#![allow(unreachable_pub, reason = "a test has no outside; `pub` means: for the stories")]

mod programs;
mod support;

mod desktop;
mod failures;
mod leaks;
mod observed;
mod partings;
mod reload;
mod severed;
mod ssh;
mod together;
mod tunnel;
mod web;
