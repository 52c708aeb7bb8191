//! Tests of the byte stream and of what the control shows. Cuts and resumes are tested with the hello.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

fn pair_with(options: Options, buffer: usize) -> ((Link, LinkControl), (Link, LinkControl)) {
    let (near, far) = duplex(buffer);
    let begin = |carrier: DuplexStream| {
        let secret = Secret::new([7; 32]);
        Link::begin(LinkId([1; 16]), secret, options, LinkSettings::default(), Box::new(carrier))
    };
    (begin(near), begin(far))
}

fn pair() -> ((Link, LinkControl), (Link, LinkControl)) {
    pair_with(Options::default(), 64 * 1024)
}

#[tokio::test]
async fn each_direction_ends_on_its_own() {
    let ((mut near, control), (mut far, _)) = pair();
    let far_side = async {
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        far.write_all(&got).await.unwrap();
        far.shutdown().await.unwrap();
        assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0);
    };
    let near_side = async {
        near.write_all(b"half").await.unwrap();
        near.shutdown().await.unwrap();
        assert_eq!(near.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let mut got = Vec::new();
        near.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"half");
    };
    tokio::join!(near_side, far_side);
    assert_eq!(control.ended().await, EndReason::Finished);
}

#[tokio::test]
async fn a_reader_that_sits_still_does_not_stop_the_other_direction() {
    let options = Options { receive_window: 50_000, peer_window: 50_000, ..Options::default() };
    let ((mut near, _), (mut far, _)) = pair_with(options, 4096);
    // Fill the direction that nobody reads until it takes no more.
    let stuck = std::future::poll_fn(|cx| match Pin::new(&mut near).poll_write(cx, &[1; 1000]) {
        Poll::Ready(written) => {
            written.unwrap();
            cx.waker().wake_by_ref();
            Poll::Pending::<()>
        }
        Poll::Pending => Poll::Pending,
    });
    let _ = tokio::time::timeout(Duration::from_millis(50), stuck).await;
    let mut got = vec![0; 8_000_000];
    let write = async {
        far.write_all(&[2; 8_000_000]).await.unwrap();
        far.flush().await.unwrap();
    };
    let (read, ()) = tokio::join!(near.read_exact(&mut got), write);
    read.unwrap();
    assert!(got.iter().all(|byte| *byte == 2));
}

#[tokio::test]
async fn two_writers_without_readers_hold_bounded_memory_and_go_on_when_read() {
    let options = Options { receive_window: 100_000, peer_window: 100_000, ..Options::default() };
    let ((mut near, near_control), (mut far, far_control)) = pair_with(options, 4096);
    let text = vec![3; 1_000_000];
    let writes = async { tokio::join!(near.write_all(&text), far.write_all(&text)) };
    assert!(tokio::time::timeout(Duration::from_millis(50), writes).await.is_err());
    for control in [&near_control, &far_control] {
        assert!(control.shared.driver().core.unread_bytes() <= 100_000);
        assert!(control.state().replay_bytes <= 256 * 1024);
    }
    let (mut near_reader, mut near_writer) = tokio::io::split(near);
    let (mut far_reader, mut far_writer) = tokio::io::split(far);
    let (mut got_near, mut got_far) = (Vec::new(), Vec::new());
    let (a, b, c, d) = tokio::join!(
        near_writer.shutdown(),
        far_writer.shutdown(),
        near_reader.read_to_end(&mut got_near),
        far_reader.read_to_end(&mut got_far),
    );
    assert!(a.is_ok() && b.is_ok() && c.is_ok() && d.is_ok());
    assert!(got_near.len() >= 100_000 && got_far.len() >= 100_000);
}

#[tokio::test]
async fn a_window_smaller_than_a_turn_still_takes_turns() {
    let options = Options { initial_window: 50_000, max_window: 50_000, ..Options::default() };
    let ((mut near, _), (mut far, _)) = pair_with(options, 4096);
    let text: Vec<u8> = (0..500_000_u32).map(|n| (n / 7) as u8).collect();
    let write = async {
        for turn in text.chunks(65_280) {
            std::future::poll_fn(|cx| Pin::new(&mut near).poll_turn(cx, 65_280)).await.unwrap();
            let mut turn = BytesMut::from(turn);
            while !turn.is_empty() {
                std::future::poll_fn(|cx| Pin::new(&mut near).poll_write_turn(cx, &mut turn)).await.unwrap();
            }
        }
        near.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let read = async { far.read_to_end(&mut got).await.unwrap() };
    let both = async { tokio::join!(write, read) };
    tokio::time::timeout(Duration::from_secs(60), both).await.expect("waits for room that there never is");
    assert!(got == text);
}

#[tokio::test]
async fn a_read_of_no_bytes_is_no_end() {
    let ((mut near, _), (mut far, _)) = pair();
    assert_eq!(near.read(&mut []).await.unwrap(), 0);
    assert_eq!(far.write(&[]).await.unwrap(), 0);
    far.write_all(b"x").await.unwrap();
    far.flush().await.unwrap();
    assert_eq!(near.read_u8().await.unwrap(), b'x');
}

#[tokio::test]
async fn a_dropped_read_loses_nothing() {
    let ((mut near, _), (mut far, _)) = pair();
    for n in 0..100_u8 {
        // A read that is given up while nothing is there.
        let given_up = tokio::time::timeout(Duration::ZERO, near.read(&mut [0; 10])).await;
        assert!(given_up.is_err());
        far.write_all(&[n]).await.unwrap();
        far.flush().await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), n);
    }
}

#[tokio::test]
async fn nonsense_on_the_carrier_ends_the_link_with_a_reason() {
    let (near, mut far) = duplex(64 * 1024);
    let (mut link, control) =
        Link::begin(LinkId([1; 16]), Secret::new([7; 32]), Options::default(), LinkSettings::default(), Box::new(near));
    far.write_all(&[0xff; 40]).await.unwrap();
    let error = link.read(&mut [0; 10]).await.unwrap_err();
    assert_eq!(error.to_string(), "session lost: frame of unknown kind 255");
    assert!(matches!(control.ended().await, EndReason::Violation(_)));
    assert!(!control.attached());
}

#[tokio::test]
async fn a_lost_carrier_is_noticed_with_its_reason() {
    let (near, far) = duplex(64 * 1024);
    let (mut link, control) =
        Link::begin(LinkId([1; 16]), Secret::new([7; 32]), Options::default(), LinkSettings::default(), Box::new(near));
    assert!(control.attached());
    drop(far);
    let mut byte = [0; 1];
    let reason = tokio::select! {
        _ = link.read(&mut byte) => panic!("a detached link waits"),
        reason = control.wait_detached() => reason,
    };
    assert_eq!(reason.to_string(), "the carrier was closed");
    assert!(!control.state().attached && control.end().is_none());
}

#[tokio::test]
async fn dropping_the_link_tells_the_other_side() {
    let ((near, control), (mut far, _)) = pair();
    drop(near);
    assert!(matches!(control.ended().await, EndReason::ClosedHere(_)));
    let error = far.read(&mut [0; 10]).await.unwrap_err();
    assert!(error.to_string().starts_with("closed by the other side"), "{error}");
}

#[tokio::test]
async fn metrics_follow_the_life_of_links() {
    let (near, far) = duplex(64 * 1024);
    let settings = LinkSettings::default();
    let registry = prometheus::Registry::new();
    settings.metrics.register(&registry).unwrap();
    let options = Options::default();
    let (mut link, control) =
        Link::begin(LinkId([1; 16]), Secret::new([7; 32]), options, settings.clone(), Box::new(near));
    link.write_all(b"held").await.unwrap();
    link.flush().await.unwrap();
    assert_eq!((settings.metrics.links.get(), settings.metrics.attached.get()), (1, 1));
    assert!(settings.metrics.replay_bytes.get() >= 4);
    drop(far);
    let (near, _far) = duplex(64 * 1024);
    tokio::select! {
        _ = link.read_u8() => panic!("a detached link waits"),
        _ = control.wait_detached() => {}
    }
    assert_eq!(settings.metrics.attached.get(), 0);
    control.attach(Box::new(near), 2, Positions::default()).unwrap();
    assert_eq!(settings.metrics.resumes.with_label_values(&["closed"]).get(), 1);
    assert_eq!(settings.metrics.stall_seconds.get_sample_count(), 1);
    drop(link);
    let metrics = &settings.metrics;
    assert_eq!((metrics.links.get(), metrics.attached.get(), metrics.replay_bytes.get()), (0, 0, 0));
    assert_eq!(registry.gather().len(), 7);
}

#[tokio::test(start_paused = true)]
async fn a_silent_carrier_that_is_replaced_counts_as_a_stall() {
    let (near, _silent) = duplex(64 * 1024);
    let settings = LinkSettings::default();
    let (mut link, control) =
        Link::begin(LinkId([1; 16]), Secret::new([7; 32]), Options::default(), settings.clone(), Box::new(near));
    link.write_all(b"is anybody there").await.unwrap();
    link.flush().await.unwrap();
    tokio::time::advance(std::time::Duration::from_secs(7)).await;
    let (near, _far) = duplex(64 * 1024);
    control.attach(Box::new(near), 2, Positions::default()).unwrap();
    assert_eq!(settings.metrics.resumes.with_label_values(&["replaced"]).get(), 1);
    assert_eq!(settings.metrics.stall_seconds.get_sample_sum(), 7.0);
}
