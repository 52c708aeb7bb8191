//! Carries an invitation to the control session of a device, and the answer back.
//!
//! Owns who is attached, who has subscribed for stream requests, and which invitations wait for an answer.
//! Does not know MQTT, HTTP, tickets' meaning or the clock beyond its two time limits.
//! Invariant: an identity has at most one attached session, the newest; an answer counts only from the
//! identity that was invited.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::record::Admission;
use crate::base::{Identity, Name, Secret, StreamName};

/// Invitations that may wait in one session's inbox beside the `max_pending_per_device` that may wait for an answer:
/// as many as may pass that limit's check at one moment, one on each core. Whoever finds the inbox full does not learn
/// when there is room.
const INBOX_SLACK: usize = 64;

/// At most so many, whatever the limit.
const MOST_IN_INBOX: usize = 1 << 20;

/// Devices renew their session before their token of an hour ends, the SDKs after 48 minutes; a session that is
/// replaced sooner was replaced by something else: a network that changed, or a second machine.
const RENEWAL: Duration = Duration::from_secs(10 * 60);

/// A stream request on its way to a device.
#[derive(Debug, Clone)]
pub struct Invitation {
    /// The device stream's name.
    pub stream: StreamName,
    /// Where the device is to connect: `wss://host:port/path`, the port always explicit.
    pub url: String,
    /// What admits it there, once.
    pub ticket: Secret,
    /// The policy on whose behalf the stream is opened. Told to culvert devices only.
    pub policy: Name,
    /// Request ID: a lower-case UUID.
    pub rid: String,
}

/// What a device said to an invitation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Accepted, or rejected.
    pub accepted: bool,
    /// Why it rejected, from culvert devices.
    pub reason: Option<String>,
}

/// An answer, and what had admitted the session that gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// What the device said.
    pub answer: Answer,
    /// What the device's leg stands on: when it no longer holds, the bridge ends.
    pub admission: Admission,
}

/// Why an invitation has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    /// The device was not attached and subscribed within the connect timeout.
    #[error("the device is not online, or has not subscribed for stream requests")]
    NotOnline,
    /// It was, but did not answer within the response timeout.
    #[error("the device did not answer in time")]
    NoAnswer,
}

/// What the hub tells a control session.
#[derive(Debug, Clone)]
pub enum ToDevice {
    /// Publish this stream request.
    Invite(Invitation),
}

/// Knows which devices are attached to this hub. Cheap to clone; clones share their state.
#[derive(Debug, Clone, Default)]
pub struct Courier {
    slots: Arc<Mutex<HashMap<Identity, Slot>>>,
    /// How many sessions there have been. One count for all, and for good: a session that outlives its slot must not
    /// share its number with one in the next.
    numbers: Arc<AtomicU64>,
}

/// One identity that is attached, awaited, or both.
#[derive(Debug, Default)]
struct Slot {
    session: Option<Session>,
    pending: HashMap<String, oneshot::Sender<Answered>>,
    /// Counts subscriptions, so that an inviter sees a newer session even if it missed the moment.
    subscribed: watch::Sender<u64>,
}

#[derive(Debug)]
struct Session {
    number: u64,
    peer: SocketAddr,
    attached: Instant,
    inbox: mpsc::Sender<ToDevice>,
    subscribed: bool,
    taken_over: CancellationToken,
}

/// An inbox for a session of a device that may have so many invitations waiting for an answer. It takes its room as it
/// is needed.
pub fn inbox_for(max_pending: usize) -> (mpsc::Sender<ToDevice>, mpsc::Receiver<ToDevice>) {
    mpsc::channel(max_pending.saturating_add(INBOX_SLACK).min(MOST_IN_INBOX))
}

/// The hub's hold on one control session. Dropping it detaches the session.
#[derive(Debug)]
pub struct Attachment {
    courier: Courier,
    identity: Identity,
    admission: Admission,
    number: u64,
    taken_over: CancellationToken,
}

// === impl Courier ===

impl Courier {
    /// Attaches a control session. An older session of the same identity is told at once that it was taken over.
    pub fn attach(
        &self,
        identity: &Identity,
        admission: &Admission,
        peer: SocketAddr,
        inbox: mpsc::Sender<ToDevice>,
    ) -> Attachment {
        let mut slots = self.lock();
        let slot = slots.entry(identity.clone()).or_default();
        let number = self.numbers.fetch_add(1, Relaxed) + 1;
        let taken_over = CancellationToken::new();
        let session = Session {
            number,
            peer,
            attached: Instant::now(),
            inbox,
            subscribed: false,
            taken_over: taken_over.clone(),
        };
        if let Some(older) = slot.session.replace(session) {
            older.taken_over.cancel();
            let is_suspicious = older.peer.ip() != peer.ip() || older.attached.elapsed() < RENEWAL;
            if is_suspicious {
                tracing::warn!(device = %identity, older = %older.peer, newer = %peer,
                    "control session taken over by a newer one: if this repeats, two machines share one identity");
            }
        }
        let (identity, admission) = (identity.clone(), admission.clone());
        Attachment { courier: self.clone(), identity, admission, number, taken_over }
    }

    /// Hands an invitation to the device and waits for its answer: up to `connect` for the device to be attached
    /// and subscribed, then up to `response` for the answer. The invitation is sent again, unchanged, to a newer
    /// session of the device that subscribes meanwhile.
    pub async fn invite(
        &self,
        identity: &Identity,
        invitation: Invitation,
        connect: Duration,
        response: Duration,
    ) -> Result<Answered, InviteError> {
        let mut expected = Expected::register(self, identity, &invitation.rid);
        let online_by = Instant::now() + connect;
        let session = loop {
            if let Some(session) = self.deliver(identity, &invitation, 0) {
                break session;
            }
            timeout_at(online_by, expected.subscribed.changed())
                .await
                .ok()
                .and_then(Result::ok)
                .ok_or(InviteError::NotOnline)?;
        };
        self.await_answer(&mut expected, &invitation, session, Instant::now() + response).await
    }

    async fn await_answer(
        &self,
        expected: &mut Expected,
        invitation: &Invitation,
        mut session: u64,
        deadline: Instant,
    ) -> Result<Answered, InviteError> {
        loop {
            tokio::select! {
                biased;
                answer = &mut expected.answer => return answer.map_err(|_| InviteError::NoAnswer),
                Ok(()) = expected.subscribed.changed() => {
                    session = self.deliver(&expected.identity, invitation, session).unwrap_or(session);
                }
                () = tokio::time::sleep_until(deadline) => return Err(InviteError::NoAnswer),
            }
        }
    }

    /// Puts the invitation into the inbox of the subscribed session, if that is newer than `after`.
    fn deliver(&self, identity: &Identity, invitation: &Invitation, after: u64) -> Option<u64> {
        let slots = self.lock();
        let session = slots.get(identity)?.session.as_ref().filter(|s| s.subscribed && s.number > after)?;
        session.inbox.try_send(ToDevice::Invite(invitation.clone())).ok()?;
        Some(session.number)
    }

    /// True while a control session of this identity is attached.
    pub fn is_attached(&self, identity: &Identity) -> bool {
        self.lock().get(identity).is_some_and(|slot| slot.session.is_some())
    }

    /// How many invitations to this identity wait for an answer.
    pub fn pending(&self, identity: &Identity) -> usize {
        self.lock().get(identity).map_or(0, |slot| slot.pending.len())
    }

    /// How many control sessions are attached.
    pub fn sessions(&self) -> usize {
        self.lock().values().filter(|slot| slot.session.is_some()).count()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Identity, Slot>> {
        // The map is consistent between statements: a panic elsewhere while it was held cannot have torn it.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_slot(&self, identity: &Identity, change: impl FnOnce(&mut Slot)) {
        let mut slots = self.lock();
        if let Some(slot) = slots.get_mut(identity) {
            change(slot);
            if slot.session.is_none() && slot.pending.is_empty() {
                slots.remove(identity);
            }
        }
    }
}

/// An invitation's place in the slot; dropping it withdraws the invitation.
struct Expected {
    courier: Courier,
    identity: Identity,
    rid: String,
    answer: oneshot::Receiver<Answered>,
    subscribed: watch::Receiver<u64>,
}

impl Expected {
    fn register(courier: &Courier, identity: &Identity, rid: &str) -> Self {
        let (sender, answer) = oneshot::channel();
        let mut slots = courier.lock();
        let slot = slots.entry(identity.clone()).or_default();
        slot.pending.insert(rid.to_owned(), sender);
        let subscribed = slot.subscribed.subscribe();
        Self { courier: courier.clone(), identity: identity.clone(), rid: rid.to_owned(), answer, subscribed }
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.courier.with_slot(&self.identity, |slot| {
            slot.pending.remove(&self.rid);
        });
    }
}

// === impl Attachment ===

impl Attachment {
    /// Whose session this is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The session has subscribed for stream requests: invitations may come to its inbox.
    pub fn subscribed(&self) {
        self.set_subscribed(true);
    }

    /// The session has withdrawn its subscription.
    pub fn unsubscribed(&self) {
        self.set_subscribed(false);
    }

    /// The device answered the invitation `rid`. An answer to nothing, or a second one, is ignored.
    pub fn answer(&self, rid: &str, answer: Answer) {
        self.courier.with_slot(&self.identity, |slot| {
            if let Some(waiting) = slot.pending.remove(rid) {
                // The inviter may have given up at this moment; then nobody wants the answer.
                let _ = waiting.send(Answered { answer, admission: self.admission.clone() });
            }
        });
    }

    /// Resolves when a newer session of the same identity attached.
    pub async fn taken_over(&self) {
        self.taken_over.cancelled().await;
    }

    fn set_subscribed(&self, subscribed: bool) {
        self.courier.with_slot(&self.identity, |slot| {
            let Some(session) = slot.session.as_mut().filter(|s| s.number == self.number) else { return };
            session.subscribed = subscribed;
            if subscribed {
                slot.subscribed.send_modify(|count| *count += 1);
            }
        });
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.courier.with_slot(&self.identity, |slot| {
            if slot.session.as_ref().is_some_and(|s| s.number == self.number) {
                slot.session = None;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::record::Anchor;

    fn pump() -> Identity {
        "pump-17".parse().unwrap()
    }

    fn peer() -> SocketAddr {
        "192.0.2.1:5000".parse().unwrap()
    }

    fn invitation(rid: &str) -> Invitation {
        Invitation {
            stream: "ssh".parse().unwrap(),
            url: "wss://hub:443/bridges/1".into(),
            ticket: Secret::new("ticket"),
            policy: "service".parse().unwrap(),
            rid: rid.into(),
        }
    }

    const YES: Answer = Answer { accepted: true, reason: None };
    const KEY: Admission = Admission::Authority(Anchor([0; 32]));
    const MINUTE: Duration = Duration::from_secs(60);

    async fn rid(inbox: &mut mpsc::Receiver<ToDevice>) -> String {
        let ToDevice::Invite(invitation) = inbox.recv().await.unwrap();
        invitation.rid
    }

    #[tokio::test(start_paused = true)]
    async fn an_invitation_waits_for_the_subscription_and_returns_the_answer() {
        let courier = Courier::default();
        let id = pump();
        let (sender, mut inbox) = inbox_for(16);
        let device = async {
            let attachment = courier.attach(&id, &KEY, peer(), sender);
            tokio::time::sleep(Duration::from_secs(20)).await;
            assert!(inbox.try_recv().is_err(), "not subscribed yet");
            attachment.subscribed();
            let rid = rid(&mut inbox).await;
            attachment.answer("another", Answer { accepted: false, reason: None });
            attachment.answer(&rid, YES);
            attachment
        };
        let (answer, attachment) = tokio::join!(courier.invite(&id, invitation("r1"), MINUTE, MINUTE), device);
        assert_eq!(answer, Ok(Answered { answer: YES, admission: KEY }));
        drop(attachment);
        assert!(courier.lock().is_empty(), "nothing stays behind");
    }

    #[tokio::test(start_paused = true)]
    async fn absence_and_silence_are_told_apart() {
        let courier = Courier::default();
        let id = pump();
        let absent = courier.invite(&id, invitation("r1"), Duration::from_secs(5), MINUTE).await;
        assert_eq!(absent, Err(InviteError::NotOnline));
        let (sender, _inbox) = inbox_for(16);
        let attachment = courier.attach(&id, &KEY, peer(), sender);
        attachment.subscribed();
        let silent = courier.invite(&id, invitation("r2"), Duration::ZERO, MINUTE).await;
        assert_eq!(silent, Err(InviteError::NoAnswer));
    }

    #[tokio::test(start_paused = true)]
    async fn a_newer_session_gets_the_same_request_again() {
        let courier = Courier::default();
        let id = pump();
        let (old_sender, mut old_inbox) = inbox_for(16);
        let old = courier.attach(&id, &KEY, peer(), old_sender);
        old.subscribed();
        let device = async {
            assert_eq!(rid(&mut old_inbox).await, "r1");
            let (sender, mut inbox) = inbox_for(16);
            let new = courier.attach(&id, &KEY, peer(), sender);
            old.taken_over().await;
            drop(old);
            new.subscribed();
            assert_eq!(rid(&mut inbox).await, "r1");
            new.answer("r1", YES);
            new
        };
        let (answer, new) = tokio::join!(courier.invite(&id, invitation("r1"), MINUTE, MINUTE), device);
        assert_eq!(answer, Ok(Answered { answer: YES, admission: KEY }));
        assert_eq!(courier.sessions(), 1);
        drop(new);
        assert_eq!(courier.sessions(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn another_device_cannot_answer() {
        let courier = Courier::default();
        let (sender, mut inbox) = inbox_for(16);
        let pump_session = courier.attach(&pump(), &KEY, peer(), sender);
        pump_session.subscribed();
        let (other_sender, _other_inbox) = inbox_for(16);
        let other = courier.attach(&"kiosk".parse().unwrap(), &KEY, peer(), other_sender);
        let device = async {
            let rid = rid(&mut inbox).await;
            other.answer(&rid, YES);
        };
        let id = pump();
        let (answer, ()) = tokio::join!(courier.invite(&id, invitation("r1"), MINUTE, MINUTE), device);
        assert_eq!(answer, Err(InviteError::NoAnswer));
    }

    #[tokio::test]
    async fn an_older_session_that_ends_late_detaches_nobody_else() {
        let courier = Courier::default();
        let id = pump();
        let first = courier.attach(&id, &KEY, peer(), inbox_for(16).0);
        let second = courier.attach(&id, &KEY, peer(), inbox_for(16).0);
        first.taken_over().await;
        drop(second);
        assert!(!courier.is_attached(&id));
        let third = courier.attach(&id, &KEY, peer(), inbox_for(16).0);
        drop(first);
        assert!(courier.is_attached(&id));
        drop(third);
        assert!(!courier.is_attached(&id) && courier.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_invitations_as_may_wait_find_room() {
        const MANY: usize = 1000;
        let courier = Courier::default();
        let id = pump();
        let (sender, mut inbox) = inbox_for(MANY);
        let attachment = courier.attach(&id, &KEY, peer(), sender);
        attachment.subscribed();
        let rids: Vec<String> = (0..MANY).map(|number| number.to_string()).collect();
        let invited = rids.iter().map(|rid| courier.invite(&id, invitation(rid), Duration::ZERO, MINUTE));
        let device = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            for _ in 0..MANY {
                attachment.answer(&rid(&mut inbox).await, YES);
            }
        };
        let (answers, ()) = tokio::join!(futures_util::future::join_all(invited), device);
        assert!(answers.iter().all(Result::is_ok));
    }
}
