//! A queue of bytes that costs nothing while empty.
//!
//! Owns the memory of received and of unsent data: chunks of at most 16 KiB, filled before the next one is taken,
//! and a small pool so that a bulk flow does not allocate per frame. Does not know channels or limits.
//! Invariant: `len` is the number of bytes in the chunks, and no chunk in the queue is empty.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// The largest chunk: the body of one frame.
pub(super) const CHUNK: usize = 16 * 1024;

/// The smallest chunk: a keystroke's worth of memory for a keystroke.
const SMALLEST: usize = 256;

/// Chunks kept for reuse per mux: 128 KiB, what one turn of reading and one of writing use up.
const SPARE: usize = 8;

/// Chunk lists longer than this are given back when they are empty.
const LIST: usize = 8;

/// Chunks waiting to be used again.
#[derive(Debug, Default)]
pub(super) struct Pool {
    spare: Vec<Vec<u8>>,
}

impl Pool {
    fn take(&mut self, wanted: usize) -> Vec<u8> {
        if wanted >= CHUNK / 2 {
            return self.spare.pop().unwrap_or_else(|| Vec::with_capacity(CHUNK));
        }
        Vec::with_capacity(wanted.next_power_of_two().max(SMALLEST))
    }

    fn give(&mut self, mut chunk: Vec<u8>) {
        if chunk.capacity() >= CHUNK && self.spare.len() < SPARE {
            chunk.clear();
            self.spare.push(chunk);
        }
    }

    /// Gives the memory back; for a mux without channels.
    pub(super) fn clear(&mut self) {
        self.spare = Vec::new();
    }
}

/// A queue of bytes.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    list: VecDeque<Vec<u8>>,
    /// Bytes of the first chunk that have been consumed.
    start: usize,
    len: usize,
}

impl Chunks {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn push(&mut self, mut data: &[u8], pool: &mut Pool) {
        while !data.is_empty() {
            let spare = self.list.back().map_or(0, |tail| tail.capacity() - tail.len());
            if spare == 0 {
                // A queue that already holds much will hold more: fewer, larger chunks.
                self.list.push_back(pool.take(data.len().max(self.len).min(CHUNK)));
                continue;
            }
            let (now, later) = data.split_at(spare.min(data.len()));
            if let Some(tail) = self.list.back_mut() {
                tail.extend_from_slice(now);
            }
            self.len += now.len();
            data = later;
        }
    }

    /// The first bytes; empty only if the queue is.
    pub(super) fn front(&self) -> &[u8] {
        self.list.front().map_or(&[], |chunk| &chunk[self.start..])
    }

    /// Removes the first `n` bytes (at most all of them).
    pub(super) fn consume(&mut self, mut n: usize, pool: &mut Pool) {
        while n > 0 && self.len > 0 {
            let step = n.min(self.front().len());
            self.start += step;
            self.len -= step;
            n -= step;
            if self.front().is_empty() {
                self.start = 0;
                if let Some(chunk) = self.list.pop_front() {
                    pool.give(chunk);
                }
            }
        }
        self.shrink();
    }

    /// Moves the first `n` bytes (at most all of them) to the end of `out`.
    pub(super) fn drain_into(&mut self, mut n: usize, out: &mut BytesMut, pool: &mut Pool) {
        while n > 0 && self.len > 0 {
            let front = self.front();
            let step = n.min(front.len());
            out.extend_from_slice(&front[..step]);
            self.consume(step, pool);
            n -= step;
        }
    }

    /// Takes the first chunk without copying.
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let chunk = self.list.pop_front()?;
        let mut bytes = Bytes::from(chunk);
        bytes::Buf::advance(&mut bytes, self.start);
        self.start = 0;
        self.len -= bytes.len();
        self.shrink();
        Some(bytes)
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn shrink(&mut self) {
        if self.len == 0 && self.list.capacity() > LIST {
            self.list = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_queue_holds_no_memory_and_a_small_one_little() {
        let mut pool = Pool::default();
        let mut chunks = Chunks::default();
        assert_eq!(chunks.list.capacity(), 0);
        for _ in 0..1000 {
            chunks.push(b"x", &mut pool);
        }
        let held: usize = chunks.list.iter().map(Vec::capacity).sum();
        assert!(held <= 4096, "{held}");
        chunks.consume(1000, &mut pool);
        assert!(chunks.list.is_empty());
    }

    #[test]
    fn bulk_reuses_its_chunks() {
        let mut pool = Pool::default();
        let mut chunks = Chunks::default();
        for _ in 0..100 {
            chunks.push(&[7; CHUNK], &mut pool);
            assert_eq!(chunks.list.len(), 1);
            chunks.consume(CHUNK, &mut pool);
        }
        assert_eq!(pool.spare.len(), 1);
    }

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps in prop::collection::vec((0_usize..40_000, 0_usize..40_000, 0_u8..3), 1..40)) {
            let mut pool = Pool::default();
            let mut chunks = Chunks::default();
            let mut model = VecDeque::new();
            let mut next = 0_u8;
            for (add, take, how) in steps {
                let data: Vec<u8> = (0..add).map(|_| { next = next.wrapping_mul(5).wrapping_add(3); next }).collect();
                chunks.push(&data, &mut pool);
                model.extend(data);
                let mut out = BytesMut::new();
                match how {
                    0 => chunks.drain_into(take, &mut out, &mut pool),
                    1 => out.extend_from_slice(&chunks.pop().unwrap_or_default()),
                    _ => {
                        let n = take.min(chunks.front().len());
                        out.extend_from_slice(&chunks.front()[..n]);
                        chunks.consume(n, &mut pool);
                    }
                }
                let expected: Vec<u8> = model.drain(..out.len()).collect();
                prop_assert_eq!(&out[..], &expected[..]);
                prop_assert_eq!(chunks.len(), model.len());
            }
        }
    }
}
