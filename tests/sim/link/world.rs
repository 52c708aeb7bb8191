//! One schedule: two sides, their carriers, an attacker, and a clock, all driven by one seed.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::BytesMut;

use crate::{
    base::Secret,
    proto::{
        hello::{
            BootId, Features, InstanceId, LinkId, Message, Refusal, Resume, ResumeAnswer, ResumeError, ResumeOffer,
            message_length,
        },
        link::{AttachError, Core, EndReason, Fault, MAX_PAYLOAD, Options, Positions, Read, Violation},
    },
};

/// Cuts of each schedule.
const CUTS: u64 = 20;

/// Carriers that exist at one time: the attached one, its successors, and what an attacker brings.
const MAX_CARRIERS: usize = 5;

/// A reproducible source of chance (splitmix64).
pub(super) struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.next() as u8)
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Complete,
    Lost,
}

/// What may happen in a schedule beside cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Nothing that may end the link: it must complete.
    Honest,
    /// The clock jumps while a side has no carrier.
    Jumps,
    /// One side closes the link.
    Closed,
    /// Somebody replays hellos, or tries to attach without the secret.
    Attacked,
}

/// The naive model of a direction: a byte is a function of its position, and so many were written and read.
struct Model {
    salt: u64,
    written: u64,
    finished: bool,
    read: u64,
    end_read: bool,
}

impl Model {
    fn byte(&self, position: u64) -> u8 {
        ((position ^ self.salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    fn check(&mut self, bytes: &[u8]) -> Result<(), String> {
        for byte in bytes {
            if self.read >= self.written || *byte != self.byte(self.read) {
                return Err(format!("byte {} is not what was written there", self.read));
            }
            self.read += 1;
        }
        Ok(())
    }
}

/// One direction of a carrier.
#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
}

/// What the service's end of a carrier waits for.
enum Near {
    Answer { offer: Option<ResumeOffer>, epoch: u64, got: Vec<u8>, honest: bool },
    Attached(u64),
    Closed,
}

/// What the device's end of a carrier waits for.
enum Far {
    Hello(Vec<u8>),
    Confirm { answer: Option<ResumeAnswer>, got: Vec<u8> },
    Attached(u64),
    Closed,
}

struct Carrier {
    up: Pipe,
    down: Pipe,
    near: Near,
    far: Far,
    /// Nothing is written to it any more; what is in the pipes may still arrive.
    cut: bool,
    honest: bool,
}

pub(super) struct World {
    chance: Chance,
    kind: Kind,
    fault: Option<Fault>,
    now: Instant,
    started: Instant,
    service: Core,
    device: Core,
    /// What the service wrote and the device reads, and the other way round.
    up: Model,
    down: Model,
    service_stalls: bool,
    device_stalls: bool,
    carriers: Vec<Carrier>,
    pipe_size: usize,
    secret: Secret,
    epochs: u64,
    recorded: Vec<(u64, Vec<u8>)>,
    pub(super) cuts: u64,
    pub(super) replayed: u64,
    events: VecDeque<String>,
}

type Step = Result<(), String>;

impl World {
    pub(super) fn new(seed: u64, fault: Option<Fault>) -> Self {
        let mut chance = Chance(seed);
        let kind = match seed % 16 {
            0 => Kind::Jumps,
            1 => Kind::Closed,
            2 => Kind::Attacked,
            _ => Kind::Honest,
        };
        let now = Instant::now();
        let window = 1 << (9 + chance.below(8));
        let (near, far) = (1 << (8 + chance.below(9)), 1 << (8 + chance.below(9)));
        let options = |receive_window, peer_window| Options {
            receive_window,
            peer_window,
            initial_window: window,
            max_window: window * 4,
            resume_for: Duration::from_secs(900),
        };
        let mut service = Core::new(now, options(near, far));
        let mut device = Core::new(now, options(far, near));
        (service.fault, device.fault) = (fault, fault);
        service.attach(now, 1, Positions::default()).expect("first carrier");
        device.attach(now, 1, Positions::default()).expect("first carrier");
        let model = |salt| Model { salt, written: 0, finished: false, read: 0, end_read: false };
        let first = Carrier {
            up: Pipe::default(),
            down: Pipe::default(),
            near: Near::Attached(1),
            far: Far::Attached(1),
            cut: false,
            honest: true,
        };
        Self {
            pipe_size: 1 << (6 + chance.below(10)),
            secret: Secret::new(chance.array::<32>()),
            chance,
            kind,
            fault,
            now,
            started: now,
            service,
            device,
            up: model(seed),
            down: model(!seed),
            service_stalls: false,
            device_stalls: false,
            carriers: vec![first],
            epochs: 1,
            recorded: Vec::new(),
            cuts: 0,
            replayed: 0,
            events: VecDeque::new(),
        }
    }

    /// Plays the schedule to its end.
    pub(super) fn run(&mut self) -> Result<Outcome, String> {
        while self.cuts < CUTS && !self.over() {
            self.step()?;
            self.check_bounds()?;
        }
        self.heal()
    }

    /// The last events, for whoever has to find out why.
    pub(super) fn story(&self) -> String {
        self.events.iter().map(|event| format!("  {event}\n")).collect()
    }

    pub(super) fn delivered(&self) -> u64 {
        self.up.read + self.down.read
    }

    fn over(&self) -> bool {
        self.service.ended().is_some() || self.device.ended().is_some()
    }

    fn step(&mut self) -> Step {
        match self.chance.below(32) {
            0..=8 => {
                let limit = 1 << self.chance.below(13);
                let carrier = self.chance.below(self.carriers.len());
                self.deliver(carrier, limit)
            }
            9..=13 => {
                let limit = 1 << self.chance.below(14);
                self.write(limit);
                Ok(())
            }
            14..=18 => {
                let limit = 1 << self.chance.below(14);
                self.read(limit)
            }
            19..=24 => {
                self.transmit();
                Ok(())
            }
            25 => {
                let pause = self.chance.below(20);
                self.pass(Duration::from_millis(pause as u64));
                Ok(())
            }
            26 | 27 => {
                self.connect_perhaps();
                Ok(())
            }
            28 => {
                self.stall_perhaps();
                Ok(())
            }
            29 => self.cut_perhaps(),
            30 => {
                self.attack_perhaps();
                Ok(())
            }
            _ => {
                self.disturb_perhaps();
                Ok(())
            }
        }
    }

    // === the applications ===

    fn write(&mut self, limit: usize) {
        let flush = !self.chance.one_in(3);
        let (core, model) = match self.chance.one_in(2) {
            true => (&mut self.service, &mut self.up),
            false => (&mut self.device, &mut self.down),
        };
        if !model.finished {
            // Now and then a block that is kept as it is, if there is room.
            let block = self.chance.one_in(64);
            let length = if block { MAX_PAYLOAD - limit / 8 } else { limit };
            let mut bytes: BytesMut = (model.written..model.written + length as u64).map(|at| model.byte(at)).collect();
            let taken = if block { core.write_block(&mut bytes) } else { core.write(&bytes) };
            model.written += taken as u64;
        }
        if flush {
            core.flush();
        }
    }

    fn read(&mut self, limit: usize) -> Step {
        match self.chance.one_in(2) {
            true if !self.service_stalls => read(&mut self.service, &mut self.down, self.now, limit),
            false if !self.device_stalls => read(&mut self.device, &mut self.up, self.now, limit),
            _ => Ok(()),
        }
    }

    fn stall_perhaps(&mut self) {
        if self.chance.one_in(3) {
            self.service_stalls = self.chance.one_in(3);
            self.device_stalls = self.chance.one_in(3);
        }
    }

    // === the carriers ===

    /// Each side sends on its newest carrier, as far as the pipe takes it.
    fn transmit(&mut self) {
        let now = self.now;
        for carrier in &mut self.carriers {
            if matches!(carrier.near, Near::Attached(epoch) if epoch == self.service.epoch()) {
                send(&mut self.service, &mut carrier.up, carrier.cut, self.pipe_size, now);
            }
            if matches!(carrier.far, Far::Attached(epoch) if epoch == self.device.epoch()) {
                send(&mut self.device, &mut carrier.down, carrier.cut, self.pipe_size, now);
            }
        }
    }

    fn deliver(&mut self, index: usize, limit: usize) -> Step {
        if self.carriers.is_empty() {
            return Ok(());
        }
        if self.chance.one_in(2) { self.deliver_up(index, limit) } else { self.deliver_down(index, limit) }
    }

    /// Bytes arrive at the device; the end of a cut carrier, too.
    fn deliver_up(&mut self, index: usize, limit: usize) -> Step {
        let carrier = &mut self.carriers[index];
        if carrier.up.bytes.is_empty() {
            if carrier.cut {
                if let Far::Attached(epoch) = std::mem::replace(&mut carrier.far, Far::Closed) {
                    self.device.detach(self.now, epoch);
                }
                self.bury();
            }
            return Ok(());
        }
        match &mut carrier.far {
            Far::Attached(epoch) => {
                let epoch = *epoch;
                let result = arrive(&mut self.device, &mut self.up, &mut carrier.up, self.now, (epoch, limit));
                result.map_err(|error| format!("device: {error}"))
            }
            Far::Closed => {
                carrier.up.bytes.clear();
                Ok(())
            }
            Far::Hello(_) | Far::Confirm { .. } => self.device_handshake(index, limit),
        }
    }

    /// Bytes arrive at the service.
    fn deliver_down(&mut self, index: usize, limit: usize) -> Step {
        let carrier = &mut self.carriers[index];
        if carrier.down.bytes.is_empty() {
            if carrier.cut {
                if let Near::Attached(epoch) = std::mem::replace(&mut carrier.near, Near::Closed) {
                    self.service.detach(self.now, epoch);
                }
                self.bury();
            }
            return Ok(());
        }
        match &mut carrier.near {
            Near::Attached(epoch) => {
                let epoch = *epoch;
                let result = arrive(&mut self.service, &mut self.down, &mut carrier.down, self.now, (epoch, limit));
                result.map_err(|error| format!("service: {error}"))
            }
            Near::Closed => {
                carrier.down.bytes.clear();
                Ok(())
            }
            Near::Answer { .. } => self.service_handshake(index, limit),
        }
    }

    /// Carriers of which both ends are gone are forgotten.
    fn bury(&mut self) {
        self.carriers.retain(|carrier| !matches!((&carrier.near, &carrier.far), (Near::Closed, Far::Closed)));
    }

    fn connect_perhaps(&mut self) {
        let room = self.carriers.len() < MAX_CARRIERS;
        if room && self.service.ended().is_none() && (!self.service.is_attached() || self.chance.one_in(20)) {
            self.connect();
        }
    }

    fn connect(&mut self) {
        self.epochs += 1;
        let resume = self.resume(self.epochs);
        let offer = ResumeOffer::new(&resume, self.secret.clone());
        self.recorded.push((resume.epoch, offer.hello().to_vec()));
        self.note(format!("attempt {} with {:?}", resume.epoch, resume.positions));
        self.open(offer, resume.epoch, true);
    }

    fn open(&mut self, offer: ResumeOffer, epoch: u64, honest: bool) {
        let hello = offer.hello().iter().copied().collect();
        self.carriers.push(Carrier {
            up: Pipe { bytes: hello },
            down: Pipe::default(),
            near: Near::Answer { offer: Some(offer), epoch, got: Vec::new(), honest },
            far: Far::Hello(Vec::new()),
            cut: false,
            honest,
        });
    }

    fn resume(&mut self, epoch: u64) -> Resume {
        Resume {
            required: Features::LINK,
            instance: InstanceId([1; 16]),
            boot: BootId([1; 16]),
            link: LinkId([1; 16]),
            nonce: self.chance.array(),
            epoch,
            positions: self.service.positions(),
        }
    }

    fn device_handshake(&mut self, index: usize, limit: usize) -> Step {
        let carrier = &mut self.carriers[index];
        let got = match &mut carrier.far {
            Far::Hello(got) | Far::Confirm { got, .. } => got,
            Far::Attached(_) | Far::Closed => return Ok(()),
        };
        let Some(message) = take_message(&mut carrier.up, got, limit)? else { return Ok(()) };
        let answer = match &mut carrier.far {
            Far::Confirm { answer, .. } => answer.take(),
            _ => None,
        };
        match answer {
            None => self.device_answers(index, &message),
            Some(answer) => self.device_attaches(index, answer, &message),
        }
    }

    fn device_answers(&mut self, index: usize, hello: &[u8]) -> Step {
        let Ok(Message::Resume(resume)) = Message::decode(hello) else { return Err("no resume".to_owned()) };
        let nonce = self.chance.array();
        let carrier = &mut self.carriers[index];
        let (message, far) = match self.device.asked(resume.epoch) {
            Ok(positions) => {
                let mut answer = ResumeAnswer::new(hello, resume, self.secret.clone(), nonce, positions);
                answer.believes_everything = self.fault == Some(Fault::ProofNotChecked);
                (answer.answer().to_vec(), Far::Confirm { answer: Some(answer), got: Vec::new() })
            }
            Err(AttachError::Stale) => (Message::Refuse(Refusal::Stale).encode(), Far::Closed),
            Err(AttachError::Ended(reason)) => {
                (Message::Refuse(Refusal::SessionLost(reason.to_string())).encode(), Far::Closed)
            }
        };
        carrier.far = far;
        if !carrier.cut {
            carrier.down.bytes.extend(message);
        }
        Ok(())
    }

    fn device_attaches(&mut self, index: usize, answer: ResumeAnswer, confirm: &[u8]) -> Step {
        let carrier = &mut self.carriers[index];
        carrier.far = Far::Closed;
        match answer.confirmed(confirm) {
            Ok(_) if !carrier.honest => Err("somebody without the secret was attached".to_owned()),
            Ok(resume) => {
                if let Ok(again) = self.device.attach(self.now, resume.epoch, resume.positions) {
                    carrier.far = Far::Attached(resume.epoch);
                    self.replayed += again;
                    self.note(format!("device attaches {}, {again} bytes again", resume.epoch));
                }
                Ok(())
            }
            Err(ResumeError::WrongProof) => {
                self.device.fail(EndReason::Violation(Violation::WrongProof));
                Ok(())
            }
            Err(error) => Err(format!("confirm: {error}")),
        }
    }

    fn service_handshake(&mut self, index: usize, limit: usize) -> Step {
        let random = self.chance.array();
        let carrier = &mut self.carriers[index];
        let Near::Answer { offer, epoch, got, honest } = &mut carrier.near else { return Ok(()) };
        let Some(message) = take_message(&mut carrier.down, got, limit)? else { return Ok(()) };
        let (offer, epoch, honest) = (offer.take(), *epoch, *honest);
        carrier.near = Near::Closed;
        if !honest {
            carrier.up.bytes.extend(Message::Confirm { proof: random }.encode());
            return Ok(());
        }
        let Some(offer) = offer else { return Ok(()) };
        match offer.answered(&message) {
            Ok((positions, confirm)) => {
                if !carrier.cut {
                    carrier.up.bytes.extend(confirm);
                }
                if let Ok(again) = self.service.attach(self.now, epoch, positions) {
                    self.carriers[index].near = Near::Attached(epoch);
                    self.replayed += again;
                    self.note(format!("service attaches {epoch}, {again} bytes again"));
                }
                Ok(())
            }
            Err(ResumeError::Refused(Refusal::SessionLost(text))) => {
                self.service.fail(EndReason::SessionLost(text));
                Ok(())
            }
            Err(ResumeError::Refused(Refusal::Stale)) => Ok(()),
            Err(error) => Err(format!("answer: {error}")),
        }
    }

    // === what goes wrong ===

    /// A carrier breaks: of what is on the way, a beginning arrives; each side learns of it when that is read.
    fn cut_perhaps(&mut self) -> Step {
        if self.carriers.is_empty() || !self.chance.one_in(2) {
            return Ok(());
        }
        let index = self.chance.below(self.carriers.len());
        if !self.carriers[index].cut {
            self.cut(index);
        }
        Ok(())
    }

    fn cut(&mut self, index: usize) {
        let carrier = &mut self.carriers[index];
        let (up, down) = (carrier.up.bytes.len(), carrier.down.bytes.len());
        carrier.up.bytes.truncate(self.chance.below(up + 1));
        carrier.down.bytes.truncate(self.chance.below(down + 1));
        carrier.cut = true;
        self.cuts += 1;
        let lost = up + down - carrier.up.bytes.len() - carrier.down.bytes.len();
        self.note(format!("cut {}, {lost} bytes on the way lost", self.cuts));
    }

    /// A recorded hello comes again, late or at once; somebody tries to attach without the secret.
    fn attack_perhaps(&mut self) {
        if self.carriers.len() >= MAX_CARRIERS || self.recorded.is_empty() || !self.chance.one_in(4) {
            return;
        }
        let known = self.chance.below(self.recorded.len());
        let (epoch, _) = self.recorded[known];
        let stale = epoch < self.device.epoch();
        if self.kind != Kind::Attacked && !stale {
            return;
        }
        let (epoch, secret) = match self.chance.one_in(20) && self.kind == Kind::Attacked {
            true => (self.epochs + 1 + self.chance.below(3) as u64, Secret::new(self.chance.array::<32>())),
            false => (epoch, self.secret.clone()),
        };
        let resume = self.resume(epoch);
        let offer = ResumeOffer::new(&resume, secret);
        self.note(format!("a stranger tries {epoch}"));
        self.open(offer, epoch, false);
    }

    /// The clock jumps, or a side closes the link.
    fn disturb_perhaps(&mut self) {
        let both_attached = self.service.is_attached() && self.device.is_attached();
        match self.kind {
            Kind::Honest | Kind::Attacked if both_attached && self.chance.one_in(10) => {
                self.pass(Duration::from_secs(3600));
            }
            Kind::Jumps if self.chance.one_in(10) => self.pass(Duration::from_secs(1000)),
            Kind::Closed if self.chance.one_in(100) => {
                self.note("closed".to_owned());
                if self.chance.one_in(2) { self.service.close("enough") } else { self.device.close("enough") }
            }
            _ => {}
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.service.handle_timeout(self.now);
        self.device.handle_timeout(self.now);
    }

    // === the end ===

    /// No more cuts and stalls: everything must arrive, or both sides must say that the session is lost.
    fn heal(&mut self) -> Result<Outcome, String> {
        (self.service_stalls, self.device_stalls) = (false, false);
        (self.up.finished, self.down.finished) = (true, true);
        self.service.finish();
        self.device.finish();
        for round in 0..3_000 {
            self.pass(Duration::from_millis(20));
            self.heal_carriers()?;
            self.transmit();
            for index in (0..self.carriers.len()).rev() {
                if index < self.carriers.len() {
                    self.deliver_up(index, usize::MAX)?;
                }
                if index < self.carriers.len() {
                    self.deliver_down(index, usize::MAX)?;
                }
            }
            read(&mut self.service, &mut self.down, self.now, 1 << 14)?;
            read(&mut self.device, &mut self.up, self.now, 1 << 14)?;
            self.check_bounds()?;
            if self.up.end_read && self.down.end_read {
                return Ok(Outcome::Complete);
            }
            if self.over() && round > 100 {
                return self.both_must_know();
            }
        }
        Err(format!("stuck: {:?} {:?}", self.service, self.device))
    }

    fn heal_carriers(&mut self) -> Step {
        let attaching = self.carriers.iter().any(|carrier| matches!(carrier.near, Near::Answer { honest: true, .. }));
        if !self.service.is_attached() && self.service.ended().is_none() && !attaching {
            self.carriers.iter_mut().for_each(|carrier| carrier.cut = true);
            self.connect();
        }
        // The hub ends a bridge of which one end is gone.
        for carrier in &mut self.carriers {
            let gone = matches!(carrier.near, Near::Closed) || matches!(carrier.far, Far::Closed);
            carrier.cut |= gone;
        }
        Ok(())
    }

    /// Long after one side has given up, the other one has, too, and nobody was told an end that was none.
    fn both_must_know(&mut self) -> Result<Outcome, String> {
        for index in 0..self.carriers.len() {
            self.carriers[index].cut = true;
        }
        for _ in 0..2 {
            for index in (0..self.carriers.len()).rev() {
                while index < self.carriers.len() && !self.carriers[index].up.bytes.is_empty() {
                    self.deliver_up(index, usize::MAX)?;
                }
                while index < self.carriers.len() && !self.carriers[index].down.bytes.is_empty() {
                    self.deliver_down(index, usize::MAX)?;
                }
            }
        }
        let (service, device) = (self.service.epoch(), self.device.epoch());
        self.service.detach(self.now, service);
        self.device.detach(self.now, device);
        self.pass(Duration::from_secs(901));
        for (core, model) in [(&mut self.service, &mut self.down), (&mut self.device, &mut self.up)] {
            while core.unread_bytes() > 0 {
                read(core, model, self.now, 1 << 14)?;
            }
            read(core, model, self.now, 1)?;
            if core.ended().is_none() {
                return Err("one side never learns that the session is lost".to_owned());
            }
        }
        if self.kind == Kind::Honest {
            return Err(format!("lost without need: {:?}, {:?}", self.service.ended(), self.device.ended()));
        }
        Ok(Outcome::Lost)
    }

    /// Memory is within its bound in every step.
    fn check_bounds(&self) -> Step {
        for core in [&self.service, &self.device] {
            let slack = core.window().min(MAX_PAYLOAD) + 4096 + 256;
            if core.replay_bytes() > core.window() + slack {
                return Err(format!("{} bytes held for replay, window {}", core.replay_bytes(), core.window()));
            }
            if core.unread_bytes() > core.receive_window() {
                return Err(format!("{} unread bytes held", core.unread_bytes()));
            }
        }
        Ok(())
    }

    fn note(&mut self, event: String) {
        if self.events.len() == 60 {
            self.events.pop_front();
        }
        self.events.push_back(format!("{:>9.3?} {event}", self.now - self.started));
    }
}

/// The application reads, and compares with the model.
fn read(core: &mut Core, model: &mut Model, now: Instant, limit: usize) -> Step {
    let mut buffer = vec![0; limit.min(core.unread_bytes()).max(1)];
    match core.read(now, &mut buffer) {
        Read::Bytes(count) => model.check(&buffer[..count]),
        Read::End if model.read == model.written && model.finished => {
            model.end_read = true;
            Ok(())
        }
        Read::End => Err(format!("an end after {} of {} bytes", model.read, model.written)),
        Read::Nothing | Read::Lost => Ok(()),
    }
}

/// Bytes of a carrier reach a core: through its inbox, or straight to the application.
fn arrive(core: &mut Core, model: &mut Model, pipe: &mut Pipe, now: Instant, (epoch, limit): (u64, usize)) -> Step {
    let direct = if epoch == core.epoch() && limit % 3 == 1 { core.direct_room() } else { 0 };
    let count = pipe.bytes.len().min(limit).min(if direct > 0 { direct } else { usize::MAX });
    let bytes: Vec<u8> = pipe.bytes.drain(..count).collect();
    if direct > 0 {
        core.direct(now, count);
        return model.check(&bytes);
    }
    core.handle_input(now, epoch, &bytes).map_err(|violation| violation.to_string())
}

/// Frames go into a pipe as long as it has room; what goes into a cut one is lost.
fn send(core: &mut Core, pipe: &mut Pipe, cut: bool, size: usize, now: Instant) {
    while pipe.bytes.len() < size {
        let Some(frame) = core.poll_transmit(now) else { break };
        if !cut {
            let mut bytes = BytesMut::new();
            frame.append_to(&mut bytes);
            pipe.bytes.extend(bytes);
        }
    }
}

/// Moves at most `limit` bytes towards a whole message, and never more than belong to it.
fn take_message(pipe: &mut Pipe, got: &mut Vec<u8>, limit: usize) -> Result<Option<Vec<u8>>, String> {
    for _ in 0..limit.min(pipe.bytes.len()) {
        got.extend(pipe.bytes.pop_front());
        if message_length(got).map_err(|fault| fault.to_string())? == Some(got.len()) {
            return Ok(Some(std::mem::take(got)));
        }
    }
    Ok(None)
}
