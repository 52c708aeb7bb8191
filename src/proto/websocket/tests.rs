use tokio_tungstenite::tungstenite::{Message, WebSocket, protocol::Role};

use super::*;

/// A masked client frame, made by hand.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    let mut bytes = vec![first];
    match payload.len() {
        0..=125 => bytes.push(MASKED | payload.len() as u8),
        126..=65_535 => {
            bytes.push(MASKED | 126);
            bytes.extend((payload.len() as u16).to_be_bytes());
        }
        _ => {
            bytes.push(MASKED | 127);
            bytes.extend((payload.len() as u64).to_be_bytes());
        }
    }
    bytes.extend(mask);
    bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

fn strip_in_pieces(bytes: &[u8], piece: usize) -> Result<(Vec<u8>, Decoder), Violation> {
    let (mut decoder, mut out) = (Decoder::new(End::Client), Vec::new());
    for chunk in bytes.chunks(piece) {
        let mut buffer = [vec![0; SERVER_HEADROOM], chunk.to_vec()].concat();
        let (range, outcome) = decoder.strip(&mut buffer, SERVER_HEADROOM..SERVER_HEADROOM + chunk.len());
        outcome?;
        out.extend_from_slice(&buffer[range]);
    }
    Ok((out, decoder))
}

#[test]
fn payload_survives_any_chunking() {
    let big: Vec<u8> = (0..70_000_u32).map(|n| n as u8).collect();
    let stream = [
        frame(0x82, b"one"),
        frame(0x02, b"two-"),
        frame(0x89, b"ping"),
        frame(0x00, b""),
        frame(0x80, b"three"),
        frame(0x81, b"text"),
        frame(0x8a, b"unasked pong"),
        frame(0x82, &big),
        frame(0x88, &1000_u16.to_be_bytes()),
        frame(0x82, b"after the end"),
    ]
    .concat();
    let expected = [&b"onetwo-threetext"[..], &big].concat();
    for piece in [1, 2, 3, 5, 7, 64, 1000, stream.len()] {
        let (out, mut decoder) = strip_in_pieces(&stream, piece).unwrap();
        assert!(out == expected, "pieces of {piece}");
        assert_eq!(decoder.take_ping().as_deref(), Some(&b"ping"[..]));
        assert_eq!(decoder.close(), Some(&PeerClose { code: Some(1000), reason: String::new() }));
    }
}

#[test]
fn violations_are_named_before_their_payload_is_read() {
    let close = |bytes: &[u8]| frame(0x88, bytes);
    let cases: Vec<(Vec<u8>, u16)> = vec![
        (vec![0x82, 0x05], 1002),
        (vec![0xc2, 0x85], 1002),
        (vec![0x92, 0x85], 1002),
        (vec![0x83, 0x85], 1002),
        (vec![0x8b, 0x85], 1002),
        (vec![0x80, 0x85], 1002),
        (vec![0x09, 0x80], 1002),
        (vec![0x89, 0xfe], 1002),
        ([frame(0x02, b"a"), frame(0x82, b"b")].concat(), 1002),
        (vec![0x82, 0xfe, 0, 125, 0, 0, 0, 0], 1002),
        (vec![0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0], 1002),
        (vec![0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1002),
        (vec![0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], 1009),
        (vec![0x82, 0xff, 0, 0, 0, 0, 0, 0x40, 0, 1, 0, 0, 0, 0], 1009),
        (close(&[3]), 1002),
        (close(&999_u16.to_be_bytes()), 1002),
        (close(&1005_u16.to_be_bytes()), 1002),
        (close(&[0x03, 0xe8, 0xff, 0xfe]), 1007),
        (frame(0x81, b"\xc3\x28"), 1007),
        (frame(0x81, b"\xed\xa0\x80"), 1007),
        (frame(0x81, b"\xf4\x90"), 1007),
        (frame(0x81, b"ends \xe2\x82"), 1007),
        ([frame(0x01, b"\xe2\x82"), frame(0x89, b"\xff"), frame(0x80, b"\x41")].concat(), 1007),
    ];
    for (bytes, code) in cases {
        for piece in [1, bytes.len()] {
            let violation = strip_in_pieces(&bytes, piece).map(|(out, _)| out).unwrap_err();
            assert_eq!(violation.close_code(), code, "{bytes:02x?}");
        }
    }
}

#[test]
fn a_close_without_a_code_is_no_violation() {
    let (_, decoder) = strip_in_pieces(&frame(0x88, b""), 1).unwrap();
    assert_eq!(decoder.close(), Some(&PeerClose { code: None, reason: String::new() }));
}

#[test]
fn headers_are_those_that_tungstenite_writes() {
    for length in [1, 125, 126, 65_535, 65_536] {
        let payload = SERVER_HEADROOM..SERVER_HEADROOM + length;
        let mut buffer = vec![7; SERVER_HEADROOM + length];
        let start = put_header(&mut buffer, &payload, None);
        let mut oracle = WebSocket::from_raw_socket(std::io::Cursor::new(Vec::new()), Role::Server, None);
        oracle.send(Message::binary(vec![7; length])).unwrap();
        let oracle = oracle.into_inner().into_inner();
        assert!(buffer[start..] == oracle[..], "{length}");
    }
}

/// Everything that a decoder finds when framing and payload are taken apart.
fn take_apart(bytes: &[u8], piece: usize, from: End) -> Result<(Vec<u8>, Decoder), Violation> {
    let (mut decoder, mut out, mut rest) = (Decoder::new(from), Vec::new(), bytes);
    while !rest.is_empty() && decoder.close().is_none() {
        let payload = decoder.payload_left().min(piece as u64) as usize;
        let (now, later) = rest.split_at(if payload > 0 { payload } else { decoder.wanted() }.min(rest.len()));
        if payload > 0 {
            let mut now = now.to_vec();
            decoder.take_payload(&mut now)?;
            out.extend(now);
        } else {
            decoder.take_framing(now)?;
        }
        rest = later;
    }
    Ok((out, decoder))
}

#[test]
fn a_masked_frame_is_unmasked_by_the_oracle_and_by_us() {
    let text: Vec<u8> = (0..40_000_u32).map(|n| (n * 7) as u8).collect();
    for length in [1, 7, 125, 126, 9_000, 40_000] {
        let mut mask = Mask::new([0x37, 0xfa, 0x21, 0x3d]);
        let (at_first, mut buffer) = (mask, vec![0; HEADROOM]);
        for piece in text[..length].chunks(777) {
            mask.copy(piece, &mut buffer);
        }
        let payload = HEADROOM..buffer.len();
        let start = put_header(&mut buffer, &payload, Some(at_first));
        let frame =
            [&buffer[start..], &ping(b"?", Some(at_first)), &close(Some(4001), "taken over", Some(at_first))].concat();
        let mut oracle = WebSocket::from_raw_socket(std::io::Cursor::new(frame.clone()), Role::Server, None);
        assert!(oracle.read().unwrap() == Message::binary(text[..length].to_vec()), "{length}");
        assert_eq!(oracle.read().unwrap(), Message::Ping("?".into()));
        for piece in [1, 13, 70_000] {
            let (out, mut decoder) = take_apart(&frame, piece, End::Client).unwrap();
            assert!(out == text[..length], "{length} in pieces of {piece}");
            assert_eq!(decoder.take_ping().as_deref(), Some(&b"?"[..]));
            assert_eq!(decoder.close(), Some(&PeerClose { code: Some(4001), reason: "taken over".into() }));
        }
    }
}

#[test]
fn a_server_does_not_mask() {
    let mut oracle = WebSocket::from_raw_socket(std::io::Cursor::new(Vec::new()), Role::Server, None);
    oracle.send(Message::binary(vec![7; 70_000])).unwrap();
    oracle.send(Message::Pong("!".into())).unwrap();
    let bytes = oracle.into_inner().into_inner();
    let (out, mut decoder) = take_apart(&bytes, 1000, End::Server).unwrap();
    assert!(out == vec![7; 70_000]);
    assert_eq!(decoder.take_pong().as_deref(), Some(&b"!"[..]));
    assert!(take_apart(&frame(0x82, b"masked"), 1000, End::Server).is_err());
}

#[test]
fn text_is_checked_across_frames_and_pieces_and_binary_is_not() {
    let text = "a\u{20ac}\u{1f600}\u{e9}z".as_bytes();
    for cut in 0..text.len() {
        let (first, second) = text.split_at(cut);
        let stream = [
            frame(0x01, first),
            frame(0x89, b"between"),
            frame(0x80, second),
            frame(0x02, b"\xff"),
            frame(0x80, b"\xfe"),
            frame(0x81, b""),
        ]
        .concat();
        for piece in [1, 3, stream.len()] {
            let (out, _) = strip_in_pieces(&stream, piece).unwrap();
            assert_eq!(out, [text, b"\xff\xfe"].concat());
        }
    }
}

#[test]
fn every_ping_of_a_handful_is_kept_and_of_many_the_latest() {
    let texts: Vec<Vec<u8>> = (0..10).map(|n| format!("payload-{n}").into_bytes()).collect();
    let pings: Vec<u8> = texts.iter().flat_map(|text| frame(0x89, text)).collect();
    let (_, mut decoder) = strip_in_pieces(&pings, pings.len()).unwrap();
    assert_eq!(std::iter::from_fn(|| decoder.take_ping()).collect::<Vec<_>>(), texts);
    let flood = [frame(0x89, &[1; 125]).repeat(1000), frame(0x89, b"").repeat(10_000), frame(0x89, b"latest")].concat();
    let (_, mut decoder) = strip_in_pieces(&flood, flood.len()).unwrap();
    let kept: Vec<_> = std::iter::from_fn(|| decoder.take_ping()).collect();
    assert!(kept.len() <= 2048 / 24 && kept.last().unwrap() == b"latest");
}
