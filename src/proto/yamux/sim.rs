//! Two cores, a wire that delivers in any pieces, applications that do anything, and a model that knows every byte.
//!
//! Every byte of a channel is a function of the channel, the direction and its position, so the model is three numbers
//! per direction. Applications wait for events where the core told them to: a wake-up that is missing is a hang here.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::*;

const MAX_BUFFERED: usize = 300 * 1024;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    /// Mostly small, sometimes large.
    fn size(&mut self) -> usize {
        let bits = self.below(18);
        self.below(1 << bits) + 1
    }
}

fn byte(id: u32, side: usize, position: usize) -> u8 {
    let mix = (position as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(id) << 7 ^ side as u64;
    (mix.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
}

/// What is true of one direction of a channel.
#[derive(Default)]
struct Direction {
    written: usize,
    finished: bool,
    read: usize,
    ended: bool,
}

struct Flow {
    key: Key,
    id: u32,
    reader_waits: bool,
    writer_waits: bool,
}

struct End {
    core: Core,
    flows: Vec<Flow>,
    /// On its way to the other end.
    wire: VecDeque<u8>,
    room_waits: bool,
}

struct World {
    rng: Rng,
    now: Instant,
    ends: [End; 2],
    directions: HashMap<(u32, usize), Direction>,
    /// Channels that someone reset.
    reset: HashSet<u32>,
    /// Channels that someone reset in front of bytes: these may be lost.
    reset_at_once: HashSet<u32>,
}

impl World {
    fn new(seed: u64) -> Self {
        let end = |role| {
            let options = Options { max_channels: 64, max_buffered: MAX_BUFFERED, ..Options::new(role) };
            End { core: Core::new(options), flows: Vec::new(), wire: VecDeque::new(), room_waits: false }
        };
        let rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let ends = [end(Role::Client), end(Role::Server)];
        Self {
            rng,
            now: Instant::now(),
            ends,
            directions: HashMap::new(),
            reset: HashSet::new(),
            reset_at_once: HashSet::new(),
        }
    }

    fn step(&mut self, resets: bool) {
        let side = self.rng.below(2);
        self.now += Duration::from_micros(self.rng.below(3000) as u64);
        match self.rng.below(16) {
            0 => self.open(side),
            1..=4 => self.write(side),
            5..=7 => self.read(side),
            8 if self.rng.below(4) == 0 => self.finish(side),
            9 if resets && self.rng.below(8) == 0 => self.release(side),
            10..=12 => self.transmit(side),
            _ => self.deliver(side),
        }
        self.pump(side);
    }

    fn open(&mut self, side: usize) {
        let end = &mut self.ends[side];
        if end.room_waits || end.flows.len() >= 12 {
            return;
        }
        match end.core.open(self.now) {
            Ok(key) => {
                let id = end.core.id(&key);
                end.flows.push(Flow { key, id, reader_waits: false, writer_waits: false });
            }
            Err(refusal) => {
                assert_eq!(refusal, OpenRefusal::Full);
                end.room_waits = true;
            }
        }
    }

    fn pick(&mut self, side: usize) -> Option<usize> {
        let n = self.ends[side].flows.len();
        (n > 0).then(|| self.rng.below(n))
    }

    fn write(&mut self, side: usize) {
        let Some(at) = self.pick(side) else { return };
        let n = self.rng.size();
        let end = &mut self.ends[side];
        let flow = &mut end.flows[at];
        let direction = self.directions.entry((flow.id, side)).or_default();
        if flow.writer_waits {
            return;
        }
        let data: Vec<u8> = (0..n).map(|i| byte(flow.id, side, direction.written + i)).collect();
        match end.core.write(&flow.key, &data) {
            Writing::Taken(n) => direction.written += n,
            Writing::Wait => flow.writer_waits = true,
            Writing::Failed(Failure::Finished) => assert!(direction.finished),
            Writing::Failed(failure) => assert!(self.reset.contains(&flow.id), "{failure}"),
        }
    }

    fn read(&mut self, side: usize) {
        let Some(at) = self.pick(side) else { return };
        self.read_flow(side, at);
    }

    fn read_flow(&mut self, side: usize, at: usize) {
        let limit = self.rng.size();
        let end = &mut self.ends[side];
        let flow = &mut end.flows[at];
        if flow.reader_waits {
            return;
        }
        let from = self.directions.entry((flow.id, 1 - side)).or_default();
        let n = match end.core.read(&flow.key) {
            Reading::Data(data) => {
                let n = data.len().min(limit);
                for (i, got) in data[..n].iter().enumerate() {
                    assert_eq!(
                        *got,
                        byte(flow.id, 1 - side, from.read + i),
                        "channel {} at {}",
                        flow.id,
                        from.read + i
                    );
                }
                n
            }
            Reading::End => {
                assert!(from.finished && from.read == from.written, "an end in mid-data");
                from.ended = true;
                0
            }
            Reading::Failed(failure) => {
                assert!(self.reset.contains(&flow.id), "{failure}");
                let whole = self.reset_at_once.contains(&flow.id) || from.read == from.written;
                return assert!(whole, "channel {}: a reset in front of what was written before it", flow.id);
            }
            Reading::Wait => return flow.reader_waits = true,
        };
        from.read += n;
        end.core.consume(&flow.key, n);
    }

    fn finish(&mut self, side: usize) {
        let Some(at) = self.pick(side) else { return };
        let flow = &self.ends[side].flows[at];
        self.directions.entry((flow.id, side)).or_default().finished = true;
        if let Err(failure) = self.ends[side].core.finish(&flow.key) {
            assert!(self.reset.contains(&flow.id), "{failure}");
        }
    }

    fn release(&mut self, side: usize) {
        let Some(at) = self.pick(side) else { return };
        let flow = self.ends[side].flows.swap_remove(at);
        let ours = self.directions.get(&(flow.id, side)).is_some_and(|direction| direction.finished);
        let theirs = self.directions.get(&(flow.id, 1 - side)).is_some_and(|d| d.finished && d.read == d.written);
        if !(ours && theirs) {
            self.reset.insert(flow.id);
        }
        if self.rng.below(2) == 0 {
            self.ends[side].core.reset_behind(self.now, &flow.key);
        } else {
            self.reset_at_once.insert(flow.id);
        }
        self.ends[side].core.release(&flow.key);
        // The end may not have been received yet although it was meant: then this was a reset too.
        self.reset.insert(flow.id);
    }

    fn transmit(&mut self, side: usize) {
        let mut out = BytesMut::new();
        let end = &mut self.ends[side];
        if end.wire.len() < 100_000 {
            let wanted = end.core.wants_transmit();
            let any = end.core.poll_transmit(self.now, &mut out);
            assert!(wanted || !any, "the driver would have slept");
            assert!(out.len() <= TURN && any != out.is_empty());
            end.wire.extend(&out[..]);
        }
    }

    fn deliver(&mut self, side: usize) {
        let n = self.rng.size();
        let [left, right] = &mut self.ends;
        let (from, to) = if side == 0 { (left, right) } else { (right, left) };
        if to.core.wants_input() {
            let data: Vec<u8> = from.wire.drain(..n.min(from.wire.len())).collect();
            to.core.handle_input(self.now, &data).expect("peers keep to the protocol");
            assert!(to.core.unread() < MAX_BUFFERED + n);
        }
        self.pump(1 - side);
    }

    /// Passes events on and takes in what arrived.
    fn pump(&mut self, side: usize) {
        let end = &mut self.ends[side];
        while let Some(event) = end.core.poll_event() {
            match event {
                Event::Readable(slot) => {
                    end.flows.iter_mut().filter(|f| f.key.slot() == slot).for_each(|f| f.reader_waits = false)
                }
                Event::Writable(slot) => {
                    end.flows.iter_mut().filter(|f| f.key.slot() == slot).for_each(|f| f.writer_waits = false)
                }
                Event::Room => end.room_waits = false,
                Event::Incoming => {}
            }
        }
        while let Some(key) = end.core.accept() {
            let id = end.core.id(&key);
            end.flows.push(Flow { key, id, reader_waits: false, writer_waits: false });
        }
        assert!(end.core.unsent() <= MAX_BUFFERED + 1024 * end.core.channels());
    }

    fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 20_000, "a hang: {:?}", self.stuck());
            for side in 0..2 {
                for at in 0..self.ends[side].flows.len() {
                    self.read_flow(side, at);
                }
                self.transmit(side);
                self.deliver(side);
                self.pump(side);
            }
            if self.stuck().is_empty() && self.ends.iter().all(|end| end.wire.is_empty() && !end.core.wants_transmit())
            {
                return;
            }
        }
    }

    /// Directions with bytes or an end under way.
    fn stuck(&self) -> Vec<(u32, usize, usize, usize)> {
        let open = |(key, direction): (&(u32, usize), &Direction)| {
            let live = !self.reset.contains(&key.0);
            let done = direction.read == direction.written && direction.finished == direction.ended;
            (live && !done).then_some((key.0, key.1, direction.written, direction.read))
        };
        self.directions.iter().filter_map(open).collect()
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    let steps = 200 + world.rng.below(2000);
    for _ in 0..steps {
        world.step(!seed.is_multiple_of(3));
    }
    world.settle();
    for side in 0..2 {
        for flow in std::mem::take(&mut world.ends[side].flows) {
            world.reset.insert(flow.id);
            world.reset_at_once.insert(flow.id);
            world.ends[side].core.release(&flow.key);
        }
    }
    world.settle();
    for end in &mut world.ends {
        while let Some(key) = end.core.accept() {
            end.core.release(&key);
        }
        assert_eq!((end.core.channels(), end.core.unread(), end.core.unsent()), (0, 0, 0));
        assert!(end.core.by_id.is_empty() && end.core.grown == 0 && end.core.want_growth == 0);
    }
}

#[test]
fn nothing_is_lost_duplicated_or_forgotten() {
    let random = std::collections::hash_map::RandomState::new();
    let random = std::hash::BuildHasher::hash_one(&random, 0);
    for seed in (1..=400).chain([random]) {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
