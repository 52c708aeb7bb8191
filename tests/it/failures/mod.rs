//! What goes wrong, and what a person reads where they look: each story is one row of a table.

mod clocks;
mod credentials;
mod files;
mod paths;
