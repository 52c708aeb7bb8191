//! Bytes that are told apart: a stream whose every byte depends on its position.

use std::{
    fs::File,
    io::{self, BufWriter, Read, Write as _},
    path::Path,
    process::Command,
};

use super::process::run;

/// A repeatable stream without structure that a relay could hide behind.
pub struct Pattern(u64);

impl Pattern {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn take_bytes(seed: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        Self::new(seed).fill(&mut bytes);
        bytes
    }

    /// The next bytes; whoever takes them in other portions takes multiples of eight.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            // xorshift64
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Writes a file of so many bytes.
pub fn write_file(path: &Path, seed: u64, bytes: u64) {
    let (mut file, mut pattern) = (BufWriter::new(File::create(path).unwrap()), Pattern::new(seed));
    let mut buffer = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let now = buffer.len().min(usize::try_from(left).unwrap());
        pattern.fill(&mut buffer[..now]);
        file.write_all(&buffer[..now]).unwrap();
        left -= now as u64;
    }
    file.flush().unwrap();
}

/// A file's SHA-256, by the program that people use.
pub fn sha256_of(path: &Path) -> String {
    let line = run(Command::new("sha256sum").arg(path));
    line.split(' ').next().unwrap().to_owned()
}

/// Reads to the end, however it comes.
pub fn drain(from: &mut impl Read) -> (u64, io::Result<()>) {
    let mut buffer = vec![0; 64 << 10];
    let mut count = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return (count, Ok(())),
            Ok(read) => count += read as u64,
            Err(error) => return (count, Err(error)),
        }
    }
}
