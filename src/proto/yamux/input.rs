//! What the peer says.
//!
//! Owns the parser and the reaction to each frame. Does not know what will be sent when. Invariant: input in any
//! chunking has the same effect, and nothing is allocated for a length that was not checked against a window.

use std::time::Instant;

use super::channel::{Channel, Failure, Fin};
use super::core::{Core, Event, Phase};
use super::frame::{ACK, FIN, HEADER, Header, Kind, RST, SYN, Violation};

/// Answers to pings not yet sent. Peers have one ping under way, or one per keepalive interval.
const MAX_PONGS: usize = 256;

/// Resets of refused channels not yet sent. A peer that keeps to the limit it was told never needs one.
const MAX_REFUSALS: usize = 1024;

/// Why input ends the mux.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// The peer broke the protocol; it is told so.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The peer says that we broke the protocol, or that it is broken itself.
    #[error("the peer ended the mux with code {0}")]
    PeerFailed(u32),
}

/// Where in a frame the input is.
#[derive(Debug)]
pub(super) enum Parser {
    Header { bytes: [u8; HEADER], filled: usize },
    Body { id: u32, remaining: u32, fin: bool },
}

impl Default for Parser {
    fn default() -> Self {
        Self::Header { bytes: [0; HEADER], filled: 0 }
    }
}

impl Core {
    /// The peer said this. After an error only the GoAway is left to be transmitted.
    pub fn handle_input(&mut self, now: Instant, mut data: &[u8]) -> Result<(), InputError> {
        while !data.is_empty() && self.phase != Phase::Ended {
            data = match &mut self.parser {
                Parser::Header { bytes, filled } => {
                    let (head, rest) = data.split_at(data.len().min(HEADER - *filled));
                    bytes[*filled..*filled + head.len()].copy_from_slice(head);
                    *filled += head.len();
                    if *filled == HEADER {
                        let bytes = *bytes;
                        self.parser = Parser::default();
                        self.on_header(now, &bytes)?;
                    }
                    rest
                }
                Parser::Body { id, remaining, fin } => {
                    let (body, rest) = data.split_at(data.len().min(*remaining as usize));
                    *remaining -= body.len() as u32;
                    let (id, ended, fin) = (*id, *remaining == 0, *fin);
                    if ended {
                        self.parser = Parser::default();
                    }
                    self.on_body(id, body);
                    if ended && fin {
                        self.on_fin(id);
                    }
                    rest
                }
            };
        }
        if !self.wants_input() && self.over_since.is_none() && self.phase != Phase::Ended {
            self.over_since = Some(now);
        }
        Ok(())
    }

    /// True between frames: the input may end here without a frame being cut.
    #[must_use]
    pub fn is_between_frames(&self) -> bool {
        matches!(self.parser, Parser::Header { filled: 0, .. })
    }

    fn on_header(&mut self, now: Instant, bytes: &[u8; HEADER]) -> Result<(), InputError> {
        let result = Header::decode(bytes).map_err(InputError::from).and_then(|header| match header.kind {
            Kind::Data => Ok(self.on_data(now, header)?),
            Kind::WindowUpdate => Ok(self.on_window_update(now, header)?),
            Kind::Ping => Ok(self.on_ping(now, header)?),
            Kind::GoAway => self.on_go_away(header.length),
        });
        match result {
            Err(InputError::Violation(_)) => self.go_away_now(1),
            Err(InputError::PeerFailed(_)) => self.abort(),
            Ok(()) => {}
        }
        result
    }

    fn on_data(&mut self, now: Instant, header: Header) -> Result<(), Violation> {
        let Header { id, length, .. } = header;
        self.on_common(now, header)?;
        let limit = self.options.max_window;
        if let Some(channel) = self.open_channel(id) {
            if length > channel.credit {
                return Err(Violation::Window { id, length, window: channel.credit });
            }
            channel.credit -= length;
            channel.arriving = length;
        } else if length > limit {
            // For a channel that is gone: what was on its way is dropped, but no window was ever larger.
            return Err(Violation::FrameLength(length));
        }
        let fin = header.has(FIN);
        if length > 0 {
            self.parser = Parser::Body { id, remaining: length, fin };
        } else if fin {
            self.on_fin(id);
        }
        Ok(())
    }

    fn on_window_update(&mut self, now: Instant, header: Header) -> Result<(), Violation> {
        let Header { id, length, .. } = header;
        self.on_common(now, header)?;
        let Some(&slot) = self.by_id.get(&id) else { return Ok(()) };
        if let Some(channel) = self.slots.get_mut(slot as usize).and_then(Option::as_deref_mut) {
            channel.send_credit = channel.send_credit.checked_add(length).ok_or(Violation::WindowOverflow(id))?;
            if channel.sendable() {
                self.schedule.resume(slot, &mut channel.turn);
            }
        }
        if header.has(FIN) {
            self.on_fin(id);
        }
        Ok(())
    }

    /// What data frames and window updates share: opening and resetting.
    fn on_common(&mut self, now: Instant, header: Header) -> Result<(), Violation> {
        if header.id == 0 {
            return Err(Violation::ZeroChannel);
        }
        if header.has(RST) {
            if let Some(&slot) = self.by_id.get(&header.id) {
                self.on_reset(slot);
            }
        } else if header.has(SYN) {
            self.on_syn(now, header.id)?;
        }
        Ok(())
    }

    fn on_syn(&mut self, now: Instant, id: u32) -> Result<(), Violation> {
        let peers = if self.options.role == super::core::Role::Client { 0 } else { 1 };
        if id % 2 != peers {
            return Err(Violation::Parity(id));
        }
        if self.by_id.contains_key(&id) {
            return Err(Violation::OpenedTwice(id));
        }
        // Channels that are over on the wire but still in the application's hands do not count against the peer,
        // who cannot know of them; but they are not free, so that there is a limit to them too.
        let limit = self.options.max_channels;
        let full = self.inbound >= limit || self.inbound_slots >= limit.saturating_mul(2);
        if full || self.refuses || self.phase != Phase::Running {
            if self.refusals.len() >= MAX_REFUSALS {
                return Err(Violation::Flood);
            }
            self.refusals.push_back(id);
            return Ok(());
        }
        let slot = self.insert(Channel::new(id, false));
        self.enqueue_control(slot);
        self.arrivals.push_back(slot);
        self.events.push_back(Event::Incoming);
        self.round_trip.want(now);
        Ok(())
    }

    fn on_reset(&mut self, slot: u32) {
        let Some(channel) = self.channel_mut(slot) else { return };
        if channel.failure.is_some() {
            // Both sides reset at once: ours need not be sent any more.
            channel.owes.reset = false;
            self.settle(slot);
        } else {
            self.fail_channel(slot, Failure::ResetByPeer);
        }
    }

    fn on_fin(&mut self, id: u32) {
        let Some(&slot) = self.by_id.get(&id) else { return };
        if let Some(channel) = self.channel_mut(slot)
            && channel.failure.is_none()
        {
            channel.fin_received = true;
            self.notify_reader(slot);
            self.settle(slot);
        }
    }

    fn on_body(&mut self, id: u32, body: &[u8]) {
        let Some(&slot) = self.by_id.get(&id) else { return };
        let Some(channel) = self.slots.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return };
        channel.arriving = channel.arriving.saturating_sub(body.len() as u32);
        if channel.failure.is_some() || channel.fin == Fin::Reset {
            return;
        }
        if channel.fin_received {
            return self.fail_channel(slot, Failure::DataAfterEnd);
        }
        channel.received.push(body, &mut self.pool);
        self.unread += body.len();
        self.notify_reader(slot);
    }

    /// A channel whose data still counts.
    fn open_channel(&mut self, id: u32) -> Option<&mut Channel> {
        let slot = *self.by_id.get(&id)?;
        self.channel_mut(slot).filter(|channel| channel.failure.is_none())
    }

    fn on_ping(&mut self, now: Instant, header: Header) -> Result<(), Violation> {
        if header.has(ACK) {
            self.round_trip.answer(now, header.length);
        } else if self.pongs.len() >= MAX_PONGS {
            return Err(Violation::Flood);
        } else {
            self.pongs.push_back(header.length);
        }
        Ok(())
    }

    fn on_go_away(&mut self, code: u32) -> Result<(), InputError> {
        if code != 0 {
            return Err(InputError::PeerFailed(code));
        }
        self.peer_leaves = true;
        self.events.push_back(Event::Room);
        Ok(())
    }
}
