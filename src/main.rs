//! The `culvert` program: see [`culvert::cli`].

fn main() {}
