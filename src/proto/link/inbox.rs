//! What was received and not yet read.
//!
//! Owns the bytes between the received and the consumed position. Does not know frames or credit.
//! Invariant: empty means no memory.

use std::collections::VecDeque;

/// Bytes of a block: large enough that a full window is a short queue.
const BLOCK: usize = 32 * 1024;

/// A queue of bytes in blocks, so that growth never copies and emptiness frees.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    blocks: VecDeque<Vec<u8>>,
    /// Bytes of the first block that were read.
    taken: usize,
    length: usize,
}

impl Inbox {
    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub(super) fn push(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len();
        while !bytes.is_empty() {
            if self.blocks.back().is_none_or(|block| block.len() == block.capacity()) {
                self.blocks.push_back(Vec::with_capacity(bytes.len().clamp(1024, BLOCK)));
            }
            let Some(block) = self.blocks.back_mut() else { return };
            let (now, later) = bytes.split_at(bytes.len().min(block.capacity() - block.len()));
            block.extend_from_slice(now);
            bytes = later;
        }
    }

    /// Moves bytes out; returns how many.
    pub(super) fn take(&mut self, out: &mut [u8]) -> usize {
        let mut done = 0;
        while done < out.len() {
            let Some(block) = self.blocks.front() else { break };
            let bytes = &block[self.taken..];
            let now = bytes.len().min(out.len() - done);
            out[done..done + now].copy_from_slice(&bytes[..now]);
            done += now;
            self.taken += now;
            if self.taken == block.len() {
                self.blocks.pop_front();
                self.taken = 0;
            }
        }
        self.length -= done;
        if self.length == 0 {
            *self = Self::default();
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let text: Vec<u8> = (0..100_000_u32).map(|n| (n * 7) as u8).collect();
        let (mut inbox, mut out) = (Inbox::default(), Vec::new());
        for (piece, take) in text.chunks(1234).zip([1, 5000, 0, 900].into_iter().cycle()) {
            inbox.push(piece);
            let mut buffer = vec![0; take];
            let taken = inbox.take(&mut buffer);
            out.extend_from_slice(&buffer[..taken]);
        }
        let mut rest = vec![0; inbox.len()];
        inbox.take(&mut rest);
        out.extend_from_slice(&rest);
        assert!(inbox.is_empty() && out == text);
    }
}
