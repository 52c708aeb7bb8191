//! What was written and is not yet consumed by the other side.
//!
//! Owns the replay buffer, in absolute positions. Does not know windows, frames or carriers.
//! Invariant: `start <= next <= end` and `next <= sent <= end`; the bytes of `start..end` are held, in order, once.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

use super::frame::MAX_PAYLOAD;

/// Smallest block that is allocated: a page, so that keystrokes share one.
const MIN_BLOCK: usize = 4 * 1024;

/// Smallest block that is kept, the application's instead of a copy and our own for later: nearly a full frame, so that
/// little memory stays unused.
const MIN_KEPT: usize = MAX_PAYLOAD - 4 * 1024;

/// What a chunk costs beside its bytes: its entry in the queue and its share of the allocator's book-keeping.
pub(super) const CHUNK_COST: usize = 64;

/// Free blocks kept for the next writes while bytes flow: what one acknowledgement frees on a fast local path, so that
/// a bulk flow neither allocates nor faults pages in for each frame. Given back a second after the last byte.
const MAX_SPARE: usize = 16;

/// The replay buffer.
#[derive(Debug)]
pub(super) struct Outbox {
    start: u64,
    next: u64,
    sent: u64,
    end: u64,
    chunks: VecDeque<Chunk>,
    /// Index of the chunk that holds `next`; the number of chunks if only the tail does.
    cursor: usize,
    tail: BytesMut,
    held: usize,
    spare: Vec<BytesMut>,
}

/// Bytes that were, or may be, sent as one frame.
#[derive(Debug)]
struct Chunk {
    position: u64,
    bytes: Bytes,
    /// What it counts against the window: its bytes, its entry, and memory of its block that nobody will use.
    cost: usize,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            start: 0,
            next: 0,
            sent: 0,
            end: 0,
            chunks: VecDeque::new(),
            cursor: 0,
            tail: BytesMut::new(),
            held: 0,
            spare: Vec::new(),
        }
    }

    /// First position that is held.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// Position of the next byte to send on the present carrier.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Highest position ever sent on any carrier.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Position after the last byte written.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Memory held, in the coin of the window.
    pub(super) fn held(&self) -> usize {
        self.held + self.tail.len()
    }

    /// Appends bytes; the caller has checked that there is room.
    pub(super) fn push(&mut self, mut bytes: &[u8]) {
        let mut block = bytes.len().clamp(MIN_BLOCK, MAX_PAYLOAD);
        while !bytes.is_empty() {
            self.make_room(bytes.len(), block);
            let room = (self.tail.capacity() - self.tail.len()).min(MAX_PAYLOAD - self.tail.len());
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.tail.extend_from_slice(now);
            self.end += now.len() as u64;
            if self.tail.len() == MAX_PAYLOAD || self.tail.len() == self.tail.capacity() {
                self.seal_tail();
            }
            bytes = later;
            block = MAX_PAYLOAD;
        }
    }

    /// True if a block of the application's is large enough to be kept, and small enough to be one frame.
    pub(super) fn keeps(block: &BytesMut) -> bool {
        (MIN_KEPT..=MAX_PAYLOAD).contains(&block.len()) && block.capacity() <= MAX_PAYLOAD
    }

    /// Appends a block without copying it, and leaves empty memory in its place; the caller has checked that there is
    /// room for its capacity.
    pub(super) fn push_block(&mut self, block: &mut BytesMut) {
        self.seal_tail();
        let block = std::mem::replace(block, self.spare.pop().unwrap_or_default());
        let cost = block.capacity() + CHUNK_COST;
        self.held += cost;
        self.chunks.push_back(Chunk { position: self.end, bytes: block.freeze(), cost });
        self.end = self.chunks.back().map_or(self.end, |chunk| self.end + chunk.bytes.len() as u64);
    }

    /// True if a frame waits that takes no more bytes.
    pub(super) fn has_frame(&self) -> bool {
        self.cursor < self.chunks.len()
    }

    /// The next bytes to send, at most `limit` of them, with their position.
    pub(super) fn next_frame(&mut self, limit: usize) -> Option<(u64, Bytes)> {
        if limit == 0 || self.next == self.end {
            return None;
        }
        if self.cursor == self.chunks.len() {
            self.seal_tail();
        }
        let chunk = self.chunks.get(self.cursor)?;
        let skip = (self.next - chunk.position) as usize;
        let take = (chunk.bytes.len() - skip).min(limit);
        let frame = (self.next, chunk.bytes.slice(skip..skip + take));
        if skip + take == chunk.bytes.len() {
            self.cursor += 1;
        }
        self.next += take as u64;
        self.sent = self.sent.max(self.next);
        Some(frame)
    }

    /// Forgets what the other side has consumed; `position` is at most `sent`.
    pub(super) fn acknowledge(&mut self, position: u64) {
        while let Some(chunk) = self.chunks.front_mut() {
            if chunk.position >= position {
                break;
            }
            let length = chunk.bytes.len() as u64;
            if chunk.position + length > position {
                let gone = (position - chunk.position) as usize;
                chunk.bytes.advance(gone);
                chunk.position = position;
                chunk.cost -= gone;
                self.held -= gone;
                break;
            }
            self.held -= chunk.cost;
            self.cursor = self.cursor.saturating_sub(1);
            if let Some(chunk) = self.chunks.pop_front() {
                self.recycle(chunk.bytes);
            }
        }
        self.start = self.start.max(position);
        self.next = self.next.max(self.start);
        if self.start == self.end {
            self.tail = BytesMut::new();
        }
    }

    /// Goes back to a position from which the other side wants to hear again, or to what is still held.
    pub(super) fn rewind(&mut self, position: u64) {
        self.next = position.max(self.start);
        self.cursor = self.chunks.partition_point(|chunk| chunk.position + chunk.bytes.len() as u64 <= self.next);
    }

    /// Gives back the memory that is kept only for speed.
    pub(super) fn shrink(&mut self) {
        self.spare = Vec::new();
        if self.chunks.is_empty() {
            self.chunks = VecDeque::new();
        }
    }

    /// True if [`shrink`](Self::shrink) would give something back.
    pub(super) fn has_spare(&self) -> bool {
        !self.spare.is_empty()
    }

    /// Provides a tail with at least one free byte; a block's remainder is given up if the write would not fit into it.
    fn make_room(&mut self, wanted: usize, block: usize) {
        let free = self.tail.capacity() - self.tail.len();
        if free > 0 && (!self.tail.is_empty() || free >= wanted.min(block)) {
            return;
        }
        if let Some(chunk) = self.chunks.back_mut() {
            chunk.cost += free;
            self.held += free;
        }
        let spare = if block > MAX_PAYLOAD / 2 { self.spare.pop() } else { None };
        self.tail = spare.unwrap_or_else(|| BytesMut::with_capacity(block));
    }

    fn seal_tail(&mut self) {
        if self.tail.is_empty() {
            return;
        }
        // A full block is given away whole, so that it can come back when the chunk is consumed.
        let full = self.tail.capacity() - self.tail.len() < CHUNK_COST;
        let bytes = if full { std::mem::take(&mut self.tail) } else { self.tail.split() }.freeze();
        let cost = bytes.len() + CHUNK_COST;
        self.held += cost;
        self.chunks.push_back(Chunk { position: self.end - bytes.len() as u64, bytes, cost });
    }

    /// Keeps the block of a full chunk for later writes, if nobody else looks at it any more.
    fn recycle(&mut self, bytes: Bytes) {
        if self.spare.len() == MAX_SPARE || bytes.len() < MIN_KEPT {
            return;
        }
        if let Ok(mut block) = bytes.try_into_mut() {
            block.clear();
            self.spare.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(outbox: &mut Outbox) -> Vec<u8> {
        let mut sent = Vec::new();
        while let Some((position, bytes)) = outbox.next_frame(MAX_PAYLOAD) {
            assert_eq!(position + bytes.len() as u64, outbox.next());
            sent.extend_from_slice(&bytes);
        }
        sent
    }

    #[test]
    fn bytes_come_back_from_any_position() {
        let mut outbox = Outbox::new();
        let text: Vec<u8> = (0..200_000_u32).map(|n| n as u8).collect();
        for piece in text.chunks(777) {
            outbox.push(piece);
        }
        assert_eq!(drain(&mut outbox), text);
        for position in [0, 1, 65_515, 65_516, 65_517, 199_999, 200_000] {
            outbox.rewind(position);
            assert_eq!(drain(&mut outbox), text[position as usize..]);
        }
        outbox.acknowledge(100_001);
        outbox.rewind(50_000);
        assert_eq!((outbox.start(), outbox.next()), (100_001, 100_001));
        assert_eq!(drain(&mut outbox), text[100_001..]);
        outbox.acknowledge(200_000);
        assert_eq!(outbox.held(), 0);
    }

    #[test]
    fn large_writes_become_full_frames() {
        let mut outbox = Outbox::new();
        for _ in 0..8 {
            outbox.push(&[7; 65_536]);
        }
        let lengths: Vec<usize> =
            std::iter::from_fn(|| outbox.next_frame(MAX_PAYLOAD)).map(|(_, bytes)| bytes.len()).collect();
        assert_eq!(lengths, [&[MAX_PAYLOAD; 8][..], &[160]].concat());
    }

    #[test]
    fn blocks_of_a_bulk_flow_are_used_again() {
        let mut outbox = Outbox::new();
        outbox.push(&[7; MAX_PAYLOAD]);
        let first = outbox.next_frame(MAX_PAYLOAD).unwrap().1;
        let address = first.as_ptr();
        drop(first);
        outbox.acknowledge(MAX_PAYLOAD as u64);
        assert!(outbox.has_spare());
        outbox.push(&[8; MAX_PAYLOAD]);
        assert_eq!(outbox.next_frame(MAX_PAYLOAD).unwrap().1.as_ptr(), address);
    }
}
