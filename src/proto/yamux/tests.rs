//! What single frames do, and in which order they go out.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use proptest::prelude::*;

use super::frame::{ACK, FIN, Header, Kind, RST, SYN};
use super::schedule::QUANTUM;
use super::*;

fn core(role: Role) -> Core {
    Core::new(Options::new(role))
}

fn frame(kind: Kind, flags: u16, id: u32, length: u32, body: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    Header { kind, flags, id, length }.encode(&mut out);
    out.extend_from_slice(body);
    out.to_vec()
}

fn feed(core: &mut Core, bytes: &[u8]) -> Result<(), InputError> {
    core.handle_input(Instant::now(), bytes)
}

/// Everything the core has to say, as headers with the lengths of bodies skipped.
fn said(core: &mut Core) -> Vec<Header> {
    let mut out = BytesMut::new();
    let now = Instant::now();
    let mut headers = Vec::new();
    while core.poll_transmit(now, &mut out) {
        while !out.is_empty() {
            let header = Header::decode(&out.split_to(12)[..].try_into().unwrap()).unwrap();
            if header.kind == Kind::Data {
                drop(out.split_to(header.length as usize));
            }
            headers.push(header);
        }
    }
    headers
}

fn accept(core: &mut Core, id: u32) -> Key {
    feed(core, &frame(Kind::WindowUpdate, SYN, id, 0, b"")).unwrap();
    let key = core.accept().unwrap();
    said(core);
    key
}

fn write_all(core: &mut Core, key: &Key, n: usize) {
    assert_eq!(core.write(key, &vec![7; n]), Writing::Taken(n));
}

#[test]
fn opening_data_and_ends_on_the_wire() {
    let mut client = core(Role::Client);
    let key = client.open(Instant::now()).unwrap();
    write_all(&mut client, &key, 5);
    client.finish(&key).unwrap();
    let frames: Vec<_> = said(&mut client).iter().map(|h| (h.kind, h.flags, h.id, h.length)).collect();
    let opening = (Kind::WindowUpdate, SYN, 1, 0);
    assert_eq!(frames, [(Kind::Ping, SYN, 0, 0), opening, (Kind::Data, 0, 1, 5), (Kind::Data, FIN, 1, 0)]);
}

#[test]
fn a_reset_behind_bytes_follows_them_and_waits_for_a_reader_only_so_long() {
    let now = Instant::now();
    let mut client = core(Role::Client);
    let key = client.open(now).unwrap();
    write_all(&mut client, &key, 5);
    client.reset_behind(now, &key);
    client.release(&key);
    let data: Vec<_> = said(&mut client).iter().filter(|h| h.id == 1).map(|h| (h.kind, h.flags, h.length)).collect();
    assert_eq!(data, [(Kind::WindowUpdate, SYN, 0), (Kind::Data, 0, 5), (Kind::WindowUpdate, RST, 0)]);
    assert_eq!((client.channels(), client.poll_timeout().is_some()), (0, true));

    // Nobody reads: the window is used up, and what comes from there is of no interest any more.
    let key = client.open(now).unwrap();
    for _ in 0..4 {
        write_all(&mut client, &key, 64 * 1024);
        said(&mut client);
    }
    write_all(&mut client, &key, 9);
    client.reset_behind(now, &key);
    client.release(&key);
    feed(&mut client, &frame(Kind::Data, 0, 3, 2, b"hi")).unwrap();
    assert!(said(&mut client).is_empty());
    assert_eq!((client.channels(), client.unread(), client.unsent()), (1, 0, 9));
    client.handle_timeout(client.poll_timeout().unwrap());
    client.handle_timeout(now + Duration::from_secs(30));
    assert_eq!(said(&mut client).iter().map(|h| (h.flags, h.id)).collect::<Vec<_>>(), [(RST, 3)]);
    assert_eq!((client.channels(), client.unsent(), client.poll_timeout()), (0, 0, None));
}

#[test]
fn no_credit_is_given_for_what_a_frame_has_only_announced() {
    let mut server = core(Role::Server);
    let key = accept(&mut server, 1);
    // One frame of the whole window, of which a part has come and been read.
    let whole = frame(Kind::Data, 0, 1, 256 * 1024, &[7; 160 * 1024]);
    feed(&mut server, &whole).unwrap();
    server.consume(&key, 160 * 1024);
    let granted: u32 = said(&mut server).iter().filter(|h| h.kind == Kind::WindowUpdate).map(|h| h.length).sum();
    assert_eq!(granted, 160 * 1024);
    feed(&mut server, &[7; 96 * 1024]).unwrap();
    assert_eq!(server.unread(), 96 * 1024);
}

#[test]
fn a_channel_is_acknowledged_at_once() {
    let mut server = core(Role::Server);
    feed(&mut server, &frame(Kind::Data, SYN, 1, 2, b"hi")).unwrap();
    assert!(said(&mut server).iter().any(|h| (h.kind, h.flags, h.id) == (Kind::WindowUpdate, ACK, 1)));
    let key = server.accept().unwrap();
    assert_eq!(server.read(&key), Reading::Data(b"hi"));
}

#[test]
fn an_end_in_the_frame_of_the_last_data_comes_behind_it() {
    for kind in [Kind::Data, Kind::WindowUpdate] {
        let mut server = core(Role::Server);
        let key = accept(&mut server, 1);
        let (length, body) = if kind == Kind::Data { (3, &b"end"[..]) } else { (0, &b""[..]) };
        for byte in frame(kind, FIN, 1, length, body) {
            feed(&mut server, &[byte]).unwrap();
        }
        if kind == Kind::Data {
            assert_eq!(server.read(&key), Reading::Data(b"end"));
            while matches!(server.read(&key), Reading::Data(_)) {
                server.consume(&key, 1);
            }
        }
        assert_eq!(server.read(&key), Reading::End);
    }
}

#[test]
fn a_reset_overtakes_an_unread_end_but_not_unread_data() {
    for kind in [Kind::Data, Kind::WindowUpdate] {
        let mut server = core(Role::Server);
        let key = accept(&mut server, 1);
        feed(&mut server, &frame(Kind::Data, FIN, 1, 4, b"data")).unwrap();
        feed(&mut server, &frame(kind, RST, 1, 0, b"")).unwrap();
        assert_eq!(server.read(&key), Reading::Data(b"data"));
        server.consume(&key, 4);
        assert_eq!(server.read(&key), Reading::Failed(Failure::ResetByPeer));
        assert_eq!(server.write(&key, b"x"), Writing::Failed(Failure::ResetByPeer));
        server.release(&key);
        assert_eq!(server.channels(), 0);
        assert_eq!(said(&mut server), [], "a reset is not answered");
    }
}

#[test]
fn a_release_that_loses_something_is_a_reset() {
    let reset = |h: &Header| h.flags & RST != 0;
    let mut server = core(Role::Server);
    // Unread data behind a full exchange of ends.
    let key = accept(&mut server, 1);
    feed(&mut server, &frame(Kind::Data, FIN, 1, 1, b"x")).unwrap();
    server.finish(&key).unwrap();
    server.release(&key);
    assert!(said(&mut server).iter().any(reset));
    // Everything read and both ended: what is unsent goes out first.
    let key = accept(&mut server, 3);
    feed(&mut server, &frame(Kind::Data, FIN, 3, 0, b"")).unwrap();
    write_all(&mut server, &key, 9);
    server.finish(&key).unwrap();
    server.release(&key);
    let frames = said(&mut server);
    assert!(!frames.iter().any(reset) && frames.last().unwrap().flags == FIN);
    assert_eq!(server.channels(), 0);
}

#[test]
fn data_after_an_end_resets_the_channel_only() {
    let mut server = core(Role::Server);
    let (key, other) = (accept(&mut server, 1), accept(&mut server, 3));
    feed(&mut server, &frame(Kind::Data, FIN, 1, 0, b"")).unwrap();
    feed(&mut server, &frame(Kind::Data, 0, 1, 1, b"x")).unwrap();
    assert_eq!(server.read(&key), Reading::Failed(Failure::DataAfterEnd));
    assert_eq!(server.read(&other), Reading::Wait);
}

#[test]
fn violations_end_the_mux_and_are_told() {
    let too_long = 256 * 1024 + 1;
    let cases: [(Vec<u8>, Violation); 8] = [
        (frame(Kind::Data, SYN, 1, too_long, b""), Violation::Window { id: 1, length: too_long, window: 256 * 1024 }),
        (frame(Kind::WindowUpdate, SYN, 1, u32::MAX, b""), Violation::WindowOverflow(1)),
        (frame(Kind::WindowUpdate, SYN, 2, 0, b""), Violation::Parity(2)),
        (frame(Kind::WindowUpdate, SYN, 0, 0, b""), Violation::ZeroChannel),
        (frame(Kind::Data, 0, 0, 1, b""), Violation::ZeroChannel),
        (frame(Kind::WindowUpdate, SYN, 5, 0, b""), Violation::OpenedTwice(5)),
        (frame(Kind::Data, 0, 77, u32::MAX, b""), Violation::FrameLength(u32::MAX)),
        (vec![9; 12], Violation::Version(9)),
    ];
    for (bytes, violation) in cases {
        let mut server = core(Role::Server);
        let key = accept(&mut server, 5);
        assert_eq!(feed(&mut server, &bytes), Err(violation.into()));
        assert_eq!(server.read(&key), Reading::Failed(Failure::Aborted));
        let last = said(&mut server);
        assert_eq!((last.len(), last[0].kind, last[0].length), (1, Kind::GoAway, 1));
        assert!(server.is_ended() && server.open(Instant::now()).is_err());
    }
}

#[test]
fn frames_for_channels_that_are_gone_are_ignored() {
    let mut server = core(Role::Server);
    for flags in [0, FIN, RST, ACK] {
        feed(&mut server, &frame(Kind::Data, flags, 9, 3, b"old")).unwrap();
        feed(&mut server, &frame(Kind::WindowUpdate, flags, 9, 3, b"")).unwrap();
    }
    feed(&mut server, &frame(Kind::Ping, ACK, 0, 3, b"")).unwrap();
    assert_eq!((said(&mut server), server.channels()), (vec![], 0));
}

#[test]
fn floods_are_bounded_whatever_they_ask_for() {
    for flood in [frame(Kind::Ping, SYN, 0, 1, b""), vec![]] {
        let mut server = core(Role::Server);
        let mut ended = None;
        for n in 0..100_000_u32 {
            let open = frame(Kind::WindowUpdate, SYN, n * 2 + 1, 0, b"");
            ended = feed(&mut server, if flood.is_empty() { &open } else { &flood }).err();
            if ended.is_some() {
                break;
            }
        }
        assert_eq!(ended, Some(Violation::Flood.into()));
    }
    // Opening and resetting at once: each is forgotten only when the application has seen it.
    let mut server = core(Role::Server);
    let mut held = 0;
    for n in 0..100_000_u32 {
        let mut both = frame(Kind::WindowUpdate, SYN, n * 2 + 1, 0, b"");
        both.extend(frame(Kind::WindowUpdate, RST, n * 2 + 1, 0, b""));
        if feed(&mut server, &both).is_err() {
            break;
        }
        held = held.max(server.channels());
        while server.poll_event().is_some() {}
    }
    assert_eq!(held, 8192);
}

#[test]
fn beyond_the_limit_a_channel_is_refused_and_the_others_live() {
    let mut server = Core::new(Options { max_channels: 1, ..Options::new(Role::Server) });
    let key = accept(&mut server, 1);
    feed(&mut server, &frame(Kind::Data, SYN, 3, 4, b"lost")).unwrap();
    let frames = said(&mut server);
    assert_eq!((frames.len(), frames[0].id, frames[0].flags), (1, 3, RST));
    assert_eq!(server.read(&key), Reading::Wait);
}

#[test]
fn ids_start_again_and_skip_those_in_use() {
    let now = Instant::now();
    let mut client = core(Role::Client);
    let first = client.open(now).unwrap();
    client.next_id = u32::MAX;
    let last = client.open(now).unwrap();
    let next = client.open(now).unwrap();
    assert_eq!((client.id(&first), client.id(&last), client.id(&next)), (1, u32::MAX, 3));
    let mut server = core(Role::Server);
    server.next_id = u32::MAX - 1;
    let (last, next) = (server.open(now).unwrap(), server.open(now).unwrap());
    assert_eq!((server.id(&last), server.id(&next)), (u32::MAX - 1, 2));
}

#[test]
fn a_keystroke_goes_before_bulk_and_bulk_is_shared_evenly() {
    let mut client = core(Role::Client);
    let now = Instant::now();
    let keys: Vec<Key> = (0..17).map(|_| client.open(now).unwrap()).collect();
    said(&mut client);
    let mut out = BytesMut::new();
    let mut sent = [0_usize; 17];
    for turn in 0..40 {
        for key in &keys[..16] {
            // As much as there is room for.
            let _ = client.write(key, &[1; 64 * 1024]);
        }
        if turn % 2 == 1 {
            write_all(&mut client, &keys[16], 64);
        }
        assert!(client.poll_transmit(now, &mut out));
        let mut order = Vec::new();
        while !out.is_empty() {
            let header = Header::decode(&out.split_to(12)[..].try_into().unwrap()).unwrap();
            drop(out.split_to(header.length as usize));
            order.push(header.id);
            sent[header.id as usize / 2] += header.length as usize;
        }
        // The very first round is that of channels that are all new.
        if turn % 2 == 1 && turn > 16 {
            assert_eq!(order[0], 33, "the keystroke is the first frame of its turn");
        }
    }
    let (least, most) = (sent[..16].iter().min().unwrap(), sent[..16].iter().max().unwrap());
    assert!(most - least <= QUANTUM as usize + 1024, "{sent:?}");
    assert_eq!(sent[16], 1280);
}

#[test]
fn a_window_grows_to_fill_a_long_path_and_memory_is_shared() {
    const TRIP: Duration = Duration::from_millis(50);
    let mut now = Instant::now();
    let mut sender = Core::new(Options { max_buffered: 64 * 1024 * 1024, ..Options::new(Role::Client) });
    let mut receiver = Core::new(Options { max_buffered: 64 * 1024 * 1024, ..Options::new(Role::Server) });
    let key = sender.open(now).unwrap();
    let mut far: Option<Key> = None;
    let mut got = 0;
    for _ in 0..12 {
        now += TRIP;
        let (mut there, mut back) = (BytesMut::new(), BytesMut::new());
        while !matches!(sender.write(&key, &[1; 16 * 1024]), Writing::Wait) || sender.wants_transmit() {
            if !sender.poll_transmit(now, &mut there) {
                break;
            }
        }
        receiver.handle_input(now, &there).unwrap();
        far = far.or_else(|| receiver.accept());
        got = 0;
        while let Some(chunk) = receiver.take(far.as_ref().unwrap()) {
            got += chunk.len();
        }
        while receiver.poll_transmit(now, &mut back) {}
        sender.handle_input(now + TRIP, &back).unwrap();
    }
    // 16 MiB is the limit of one window; per round trip of 50 ms that is 320 MB/s.
    assert!(got > 12 * 1024 * 1024, "{got}");
    assert!(receiver.grown <= 48 * 1024 * 1024);
}

#[test]
fn who_comes_late_to_a_path_with_a_queue_gets_as_much_as_the_others() {
    const TRIP: Duration = Duration::from_millis(50);
    let mut now = Instant::now();
    let mut sender = Core::new(Options { max_buffered: 64 * 1024 * 1024, ..Options::new(Role::Client) });
    let mut receiver = Core::new(Options { max_buffered: 64 * 1024 * 1024, ..Options::new(Role::Server) });
    let mut near = vec![sender.open(now).unwrap()];
    let (mut far, mut got) = (Vec::new(), [0; 2]);
    for round in 0..40 {
        if round == 10 {
            near.push(sender.open(now).unwrap());
        }
        // One may take all there is as long as it is alone; then a queue makes the path three times as long.
        now += if round < 10 { TRIP } else { 3 * TRIP };
        let (mut there, mut back) = (BytesMut::new(), BytesMut::new());
        loop {
            let waiting = near.iter().filter(|key| matches!(sender.write(key, &[1; 16 * 1024]), Writing::Wait)).count();
            if !sender.poll_transmit(now, &mut there) && waiting == near.len() {
                break;
            }
        }
        receiver.handle_input(now, &there).unwrap();
        far.extend(std::iter::from_fn(|| receiver.accept()));
        for (key, got) in far.iter().zip(&mut got) {
            *got = std::iter::from_fn(|| receiver.take(key)).map(|chunk| chunk.len()).sum();
        }
        while receiver.poll_transmit(now, &mut back) {}
        sender.handle_input(now + if round < 10 { TRIP } else { 3 * TRIP }, &back).unwrap();
    }
    assert!(got[0] > 1024 * 1024 && got[1] * 2 > got[0], "{got:?}");
}

#[test]
fn an_idle_channel_is_small() {
    assert!(size_of::<channel::Channel>() <= 256, "{}", size_of::<channel::Channel>());
}

#[test]
fn hostile_streams_of_known_shape() {
    for flags in 0..16 {
        for kind in [Kind::Data, Kind::WindowUpdate, Kind::Ping, Kind::GoAway] {
            let mut data = vec![0xff];
            for id in [1, 2, 1, 0, 3] {
                data.extend(frame(kind, flags, id, 16, &[flags as u8; 16]));
                fuzz_yamux(&data);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn hostile_streams(
        first: u8,
        frames in prop::collection::vec((0_u8..5, 0_u16..16, 0_u32..9, prop_oneof![0_u32..40, 0_u32..300_000, Just(u32::MAX)], 0_usize..400), 0..60)
    ) {
        let mut data = vec![first];
        for (kind, flags, id, length, body) in frames {
            let mut bytes = frame(Kind::Data, flags, id, length, &vec![kind.wrapping_mul(37); body.min(length as usize)]);
            bytes[1] = kind;
            data.extend(bytes);
        }
        fuzz_yamux(&data);
    }
}
