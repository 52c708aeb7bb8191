//! A hostile peer at the streaming endpoint, for fuzzing.
//!
//! Owns the plain functions that any fuzzer or test can feed. Does not know the fuzzer. Invariant: how the bytes of a
//! peer are cut into pieces changes nothing but when they arrive.

use prometheus::IntCounter;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    close,
    relay::{BufferPool, Counters, Goodbye, Leg, MAX_PAYLOAD_OUT, Relay, Relayed, Side},
};
use crate::proto::websocket::{Decoder, End, PeerClose, SERVER_HEADROOM as HEADROOM, Violation, put_header};

/// What a decoder made of some bytes.
#[derive(Debug, PartialEq, Eq)]
struct Decoded {
    payload: Vec<u8>,
    close: Option<PeerClose>,
    violation: Option<Violation>,
}

fn decode(bytes: &[u8], piece: usize) -> Decoded {
    let mut decoder = Decoder::new(End::Client);
    let mut payload = Vec::new();
    for chunk in bytes.chunks(piece.max(1)) {
        let mut buffer = [&[0; HEADROOM], chunk].concat();
        let end = buffer.len();
        let (range, outcome) = decoder.strip(&mut buffer, HEADROOM..end);
        payload.extend_from_slice(&buffer[range.clone()]);
        if !range.is_empty() {
            put_header(&mut buffer, &range, None);
        }
        if let Err(violation) = outcome {
            return Decoded { payload, close: None, violation: Some(violation) };
        }
    }
    Decoded { payload, close: decoder.close().cloned(), violation: None }
}

/// Any bytes as the frames of a client, in pieces of the size that the first byte says, byte by byte, and whole.
///
/// # Panics
/// If it makes a difference.
pub fn fuzz_frames(data: &[u8]) {
    let Some((&piece, bytes)) = data.split_first() else { return };
    let [pieces, single, whole] = [usize::from(piece) + 1, 1, bytes.len()].map(|piece| decode(bytes, piece));
    assert!(single.payload.len() <= bytes.len(), "payload is what came");
    assert_eq!((&single.close, single.violation), (&whole.close, whole.violation));
    assert_eq!((&single.close, single.violation), (&pieces.close, pieces.violation));
    assert!(single.payload.starts_with(&pieces.payload) && pieces.payload.starts_with(&whole.payload));
    // Of text that is none, what came in the same piece is not handed out.
    if single.violation != Some(Violation::Text) {
        assert_eq!(single.payload, whole.payload);
    }
}

/// Any bytes as one leg of a bridge: the other leg gets frames whose payload is that of the first, to the last byte
/// unless the first broke the rules.
///
/// # Panics
/// If it gets anything else.
pub fn fuzz_relay(data: &[u8]) {
    let Some((&early, bytes)) = data.split_first() else { return };
    let (early, bytes) = bytes.split_at(usize::from(early).min(bytes.len()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let relayed = async {
        let ends = tokio::io::join(std::io::Cursor::new(bytes.to_vec()), tokio::io::sink());
        let (io, mut far) = tokio::io::duplex(data.len() + 4 * MAX_PAYLOAD_OUT);
        let counter = || IntCounter::new("bytes", "bytes").expect("a counter");
        let counters = Counters { to_device: counter(), to_service: counter(), this: Relayed::default() };
        let (service, device) = (Leg::new(ends, early.to_vec().into()), Leg::new(io, bytes::Bytes::new()));
        let mut relay = Relay::new(service, device, BufferPool::default(), counters);
        assert_eq!(relay.run().await, Side::Service, "the leg that said something has ended");
        far.shutdown().await.expect("a pipe");
        let [gone, survivor] =
            [Vec::new(), close(1000, "")].map(|frame| Goodbye { frame, patience: std::time::Duration::from_secs(1) });
        relay.finish(gone, survivor).await;
        drop(relay);
        let mut received = Vec::new();
        far.read_to_end(&mut received).await.expect("a pipe");
        received
    };
    let received = runtime.expect("a runtime without threads needs nothing").block_on(relayed);
    let payload = payload_of(&received);
    let Decoded { payload: sent, violation, .. } = decode(&[early, bytes].concat(), 1);
    assert!(sent.starts_with(&payload) && (violation.is_some() || sent == payload), "other bytes than were sent");
}

/// The payload of frames from the hub, the last of which is a Close.
fn payload_of(mut frames: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    loop {
        assert_eq!(frames[1] & 0x80, 0, "the hub masks nothing");
        let (header, length) = match frames[1] {
            127 => (10, frames[2..10].iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte))),
            126 => (4, usize::from(u16::from_be_bytes([frames[2], frames[3]]))),
            length => (2, usize::from(length)),
        };
        let body = &frames[header..header + length];
        match frames[0] {
            0x82 => {
                assert!((1..=MAX_PAYLOAD_OUT).contains(&length), "a frame of {length} bytes");
                payload.extend_from_slice(body);
            }
            first => {
                assert_eq!((first, frames.len()), (0x88, header + length), "only the Close comes besides, and last");
                return payload;
            }
        }
        frames = &frames[header + length..];
    }
}
