//! The mux above a device stream whose hello is done.
//!
//! Owns the translation of limits into mux options. Does not know channels' meaning. Invariant: neither side opens
//! more channels than the smaller of both limits.

use std::{pin::Pin, time::Duration};

use crate::{
    config::LinkLimits,
    transport::{
        hello::{LinkControl, LocalHello, PeerHello, Session, SessionIo},
        mux::{self, Incoming, Mux, MuxDriver, MuxOptions, Role},
    },
};

/// How long a mux that ends may take for what finished connections have left and for the other side to take it: somewhat
/// longer than the mux itself waits for its last bytes.
const GOODBYE: Duration = Duration::from_secs(6);

/// A running mux and its parts. The driver must be polled: spawn it and await it.
pub struct MuxSession {
    /// Opens channels.
    pub mux: Mux,
    /// Yields the channels that the other side opens.
    pub incoming: Incoming,
    /// Moves the bytes.
    pub driver: MuxDriver<SessionIo>,
    /// The link below, if there is one.
    pub link: Option<LinkControl>,
    /// The other daemon.
    pub peer: PeerHello,
}

/// The link's receive window: the mux takes what comes, so it is what the other side may keep for a resume.
pub fn receive_window(limits: &LinkLimits) -> u32 {
    u32::try_from(limits.max_replay).unwrap_or(u32::MAX)
}

/// A reload's new settings, for the hellos to come. What the process keeps in all cannot change while it runs.
pub fn follow_link_settings(hello: &mut LocalHello, resume_for: Duration, limits: &LinkLimits) {
    hello.resume_for = resume_for;
    hello.max_channels = limits.max_channels;
    hello.receive_window = receive_window(limits);
}

impl MuxSession {
    /// Starts the mux of a session.
    pub fn begin(session: Session, role: Role, limits: &LinkLimits) -> Self {
        let Session { io, link, peer } = session;
        let options = MuxOptions {
            max_channels: limits.max_channels.min(peer.max_channels).max(1),
            max_buffered: limits.max_buffered,
            // What all channels together may hold is the bound that counts; the core shares it out.
            max_window: u32::try_from(limits.max_buffered).unwrap_or(u32::MAX),
            ..MuxOptions::new(role)
        };
        let (mux, incoming, driver) = mux::start(io, options);
        Self { mux, incoming, driver, link, peer }
    }
}

/// Ends a session that is still up, so that the other side learns it at once: connections in use are reset, what finished
/// ones have left is delivered, if there is a carrier and time for it.
pub async fn end_session(mux: &Mux, driver: Pin<&mut MuxDriver<SessionIo>>, link: Option<&LinkControl>) {
    mux.close();
    let detached = async {
        match link {
            Some(link) => drop(link.wait_detached().await),
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        // How it ended changes nothing: it was to end.
        _ = driver => {}
        // Nobody will bring another carrier.
        () = detached => {}
        () = tokio::time::sleep(GOODBYE) => {}
    }
}
