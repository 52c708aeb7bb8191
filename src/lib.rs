//! culvert: reach devices behind NAT and firewalls over TCP, by device ID.
//!
//! One program, three roles: [`hub`] brokers and relays, [`device`] runs on each device, [`service`] runs where people
//! work. Device and service hold one *device stream* (WebSocket over TLS) between them and run a mux over it, so that
//! many forwards share it. This page is the map: where things are, and which way a byte and a control message take.
//!
//! # Floors
//!
//! A module imports only from floors strictly below its own; siblings never import each other. `tests/floors.rs`
//! enforces it.
//!
//! | floor | modules | own |
//! |---|---|---|
//! | 6 | [`cli`] | commands, signals, exit codes |
//! | 5 | [`hub`], [`device`], [`service`] | the roles |
//! | 4 | [`agent`] | what device and service share |
//! | 3 | [`forward`] | rules and flows |
//! | 2 | [`transport`], [`config`], [`telemetry`] | sockets; files; logs, metrics, health |
//! | 1 | [`proto`], [`auth`] | pure: bytes and `now` in; bytes, events and deadlines out |
//! | 0 | [`base`] | identifiers, secrets, units, backoff |
//!
//! # Words
//!
//! One word, one thing, in code, logs, metrics and documents: *carrier* (one WebSocket to the hub), *link* (a byte
//! stream between the two daemons that outlives carriers), *mux*, *channel* (one yamux stream), *forward* (a rule of
//! the service), *target* (a rule of the device), *flow* (one TCP socket joined to one channel), *bridge* (the hub's
//! pairing of two carriers), *ticket* (the bearer token that admits one side to one bridge), *request* and *answer*
//! (of a device stream, on the control channel).
//!
//! # The path of a byte
//!
//! ```text
//!  application's socket
//!    │  forward::Inlet            accept; open a channel; write proto::open's header
//!    │  forward::join             socket and channel, each direction ends by itself
//!    │  transport::mux            over the pure core in proto::yamux
//!    │  transport::link           over the pure core in proto::link: kept until the other side has it
//!    │  transport::carrier        binary messages, pings
//!    ▼  transport::tls
//!  ═══ hub ═══   gateway admits by ticket, bridge relays: bytes in on one side, the same bytes out on the other
//!    ▲  transport::tls
//!    │  transport::carrier
//!    │  transport::link
//!    │  transport::mux
//!    │  forward::serve_channel    read the header, check the target's rule, dial, answer with a verdict
//!    │  forward::join
//!  target's socket
//! ```
//!
//! # The path of a stream initiation
//!
//! Down by calls, up by return values:
//!
//! ```text
//!  service::tunnel ── POST ──▶ hub: server, guard, streams_api
//!                                hub: initiate        reserves a bridge, mints two tickets
//!                                  hub: courier       which control session?
//!                                    hub: control ── MQTT ──▶ device: session, control
//!                                                               device: invited   accepts or rejects
//!                                    hub: control ◀─ MQTT ── device: control, session
//!                                hub: initiate        URL and ticket, or an error
//!  service::tunnel ◀── 200 ──┘
//!  both: agent::HubClient::carrier(url, ticket) ─▶ hub: gateway ─▶ hub: bridge
//!  then: transport::hello, transport::link, transport::mux
//! ```
//!
//! # For programs
//!
//! [`device::Client`] and [`service::Client`] do what an SDK's clients do: they accept and open plain device streams
//! by device ID. `examples/` mirrors the SDKs' samples with them.

pub mod agent;
pub mod auth;
pub mod base;
pub mod cli;
pub mod config;
pub mod device;
pub mod forward;
pub mod hub;
pub mod proto;
pub mod service;
pub mod telemetry;
pub mod transport;
