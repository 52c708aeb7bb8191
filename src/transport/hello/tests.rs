//! Tests of the exchange on carriers, and of links born from it.

use tokio::{io::duplex, task::JoinSet};

use super::*;
use crate::transport::link::ReplayBudget;

/// A daemon with a byte for a name.
fn daemon(name: u8) -> LocalHello {
    LocalHello {
        instance: InstanceId([name; 16]),
        boot: BootId([name + 100; 16]),
        max_channels: 4096,
        receive_window: 256 * 1024,
        resume_for: Duration::from_secs(900),
        links: LinkSettings::default(),
    }
}

/// Two ends of a carrier that is cut when the `JoinSet` is dropped; what is on the way is lost.
fn carrier() -> (BoxedCarrier, BoxedCarrier, JoinSet<()>) {
    let (service, mut left) = duplex(10_000);
    let (mut right, device) = duplex(5_000);
    let mut wire = JoinSet::new();
    wire.spawn(async move {
        let _ = tokio::io::copy_bidirectional_with_sizes(&mut left, &mut right, 3_000, 3_000).await;
    });
    (Box::new(service), Box::new(device), wire)
}

fn no_links(_: &LinkId) -> Option<LinkControl> {
    None
}

async fn begin(service: &LocalHello, device: &LocalHello) -> (Session, Session, JoinSet<()>) {
    let (near, far, wire) = carrier();
    let (offered, received) = tokio::join!(offer_new(near, service), receive(far, device, &no_links));
    let Ok(Received::New(received)) = received else { panic!("{received:?}") };
    (offered.unwrap(), received, wire)
}

async fn resume(service: &LinkControl, device: &LinkControl) -> (JoinSet<()>, Result<(), HelloError>) {
    let (near, far, wire) = carrier();
    let table = |id: &LinkId| Some(device.clone()).filter(|link| link.id() == *id);
    let (service_hello, device_hello) = (daemon(1), daemon(2));
    let (offered, received) =
        tokio::join!(offer_resume(near, service, &service_hello), receive(far, &device_hello, &table));
    let result = offered.and(received.map(drop));
    (wire, result)
}

fn content(length: usize, seed: u32) -> Vec<u8> {
    (0..length as u32).map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8).collect()
}

/// Sends `out`, and reads to the end.
async fn talk(mut io: SessionIo, out: Vec<u8>) -> io::Result<Vec<u8>> {
    let (mut reader, mut writer) = tokio::io::split(&mut io);
    let mut got = Vec::new();
    let (sent, read) = tokio::join!(
        async {
            for piece in out.chunks(9_999) {
                writer.write_all(piece).await?;
            }
            writer.shutdown().await
        },
        reader.read_to_end(&mut got)
    );
    sent?;
    read?;
    Ok(got)
}

#[tokio::test]
async fn a_new_session_learns_about_the_other_side() {
    let (service, device) = (daemon(1), LocalHello { max_channels: 7, ..daemon(2) });
    let (offered, received, _wire) = begin(&service, &device).await;
    assert_eq!((offered.peer.instance, offered.peer.max_channels), (InstanceId([2; 16]), 7));
    assert_eq!((received.peer.instance, received.peer.boot), (InstanceId([1; 16]), BootId([101; 16])));
    assert_eq!(offered.link.unwrap().id(), received.link.unwrap().id());
}

#[tokio::test]
async fn without_the_link_on_either_side_the_mux_gets_the_carrier() {
    let none = Duration::ZERO;
    for (service_time, device_time) in [(none, daemon(2).resume_for), (daemon(1).resume_for, none), (none, none)] {
        let service = LocalHello { resume_for: service_time, ..daemon(1) };
        let device = LocalHello { resume_for: device_time, ..daemon(2) };
        let (mut offered, mut received, _wire) = begin(&service, &device).await;
        assert!(offered.link.is_none() && received.link.is_none());
        offered.io.write_all(b"bare").await.unwrap();
        let mut got = [0; 4];
        received.io.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"bare");
    }
}

#[tokio::test]
async fn the_smaller_time_without_a_carrier_holds() {
    let short = LocalHello { resume_for: Duration::from_secs(60), ..daemon(2) };
    let (offered, received, _wire) = begin(&daemon(1), &short).await;
    let both = [offered.link.unwrap().resume_for(), received.link.unwrap().resume_for()];
    assert_eq!(both, [Duration::from_secs(60); 2]);
}

#[tokio::test]
async fn a_session_survives_many_cuts_with_every_byte() {
    let (offered, received, mut wire) = begin(&daemon(1), &daemon(2)).await;
    let (near, far) = (offered.link.unwrap(), received.link.unwrap());
    let (up, down) = (content(3_000_000, 1), content(2_000_000, 2));
    let cuts = async {
        for _ in 0..20 {
            // Let some of the bytes pass: the other futures run while this one yields.
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
            drop(std::mem::take(&mut wire));
            tokio::join!(near.wait_detached(), far.wait_detached());
            if near.end().is_some() {
                break;
            }
            let (next, result) = resume(&near, &far).await;
            result.unwrap();
            wire = next;
        }
        std::future::pending::<()>().await
    };
    let both = async { tokio::join!(talk(offered.io, up.clone()), talk(received.io, down.clone())) };
    let (at_service, at_device) = tokio::select! {
        both = both => both,
        () = cuts => unreachable!(),
    };
    assert!(at_service.unwrap() == down && at_device.unwrap() == up);
    assert!(near.state().epoch > 10, "{}", near.state().epoch);
    assert_eq!(near.ended().await, EndReason::Finished);
}

#[tokio::test]
async fn the_newest_carrier_fences_the_older_one() {
    let (mut offered, mut received, mut first) = begin(&daemon(1), &daemon(2)).await;
    let (near, far) = (offered.link.clone().unwrap(), received.link.clone().unwrap());
    let (_second, result) = resume(&near, &far).await;
    result.unwrap();
    assert!(first.join_next().await.is_some(), "both ends dropped the first carrier");
    assert!(near.attached() && far.attached());
    offered.io.write_all(b"over the second").await.unwrap();
    offered.io.flush().await.unwrap();
    let mut got = [0; 15];
    received.io.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"over the second");
}

#[tokio::test(start_paused = true)]
async fn a_link_without_a_carrier_ends_as_session_lost() {
    let (mut offered, mut received, wire) = begin(&daemon(1), &daemon(2)).await;
    let link = offered.link.clone().unwrap();
    received.io.write_all(b"x").await.unwrap();
    received.io.flush().await.unwrap();
    assert_eq!(offered.io.read_u8().await.unwrap(), b'x');
    drop(wire);
    let started = tokio::time::Instant::now();
    let error = offered.io.read(&mut [0; 10]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    assert!(error.to_string().contains("session lost"), "{error}");
    assert!(started.elapsed() >= Duration::from_secs(900));
    assert_eq!(link.ended().await, EndReason::Expired(Duration::from_secs(900)));
    assert_eq!(offered.io.write(b"x").await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
}

#[tokio::test]
async fn a_daemon_that_forgot_the_link_says_so_and_ends_it() {
    let (mut offered, received, wire) = begin(&daemon(1), &daemon(2)).await;
    let link = offered.link.clone().unwrap();
    drop((received, wire));
    let (near, far, _wire) = carrier();
    let (service, device) = (daemon(1), daemon(2));
    let (result, turned) = tokio::join!(offer_resume(near, &link, &service), receive(far, &device, &no_links));
    assert!(matches!(turned, Err(HelloError::Turned(Refusal::UnknownLink))));
    let error = result.unwrap_err();
    assert!(error.is_session_lost(), "{error}");
    let error = offered.io.read(&mut [0; 10]).await.unwrap_err();
    assert!(error.to_string().contains("session lost"), "{error}");
}

#[tokio::test]
async fn closing_a_link_tells_the_other_side_at_once() {
    let (offered, mut received, _wire) = begin(&daemon(1), &daemon(2)).await;
    let mut io = offered.io;
    io.write_all(b"last words").await.unwrap();
    io.flush().await.unwrap();
    offered.link.unwrap().close("the daemon stops");
    let mut got = Vec::new();
    let error = received.io.read_to_end(&mut got).await.unwrap_err();
    assert_eq!((got.as_slice(), error.kind()), (&b"last words"[..], io::ErrorKind::ConnectionAborted));
    assert_eq!(received.link.unwrap().ended().await, EndReason::ClosedByPeer("the daemon stops".into()));
    assert!(io.read(&mut [0; 1]).await.is_err());
}

#[tokio::test]
async fn a_wrong_proof_ends_the_link_and_a_replayed_number_too() {
    let (_offered, received, _wire) = begin(&daemon(1), &daemon(2)).await;
    let far = received.link.unwrap();
    let table = |_: &LinkId| Some(far.clone());
    let hello = |epoch| Resume {
        required: Features::LINK,
        instance: InstanceId([1; 16]),
        boot: BootId([1; 16]),
        link: far.id(),
        nonce: [1; 16],
        epoch,
        positions: far.positions(),
    };
    let (mut thief, end, _wire) = carrier();
    let device = daemon(2);
    let steal = async {
        send(&mut thief, &Message::Resume(hello(9)).encode()).await.unwrap();
        read_message(&mut thief).await.unwrap();
        send(&mut thief, &Message::Confirm { proof: [7; 32] }.encode()).await.unwrap();
    };
    let (result, ()) = tokio::join!(receive(end, &device, &table), steal);
    assert!(matches!(result, Err(HelloError::WrongProof)), "{result:?}");
    assert_eq!(far.ended().await, EndReason::Violation(Violation::WrongProof));

    let (_offered, received, _wire) = begin(&daemon(1), &daemon(2)).await;
    let far = received.link.unwrap();
    assert_eq!(far.asked(0), Err(AttachError::Stale));
    assert!(far.end().is_none());
    assert!(matches!(far.asked(1), Err(AttachError::Ended(_))));
    assert_eq!(far.ended().await, EndReason::Violation(Violation::ReplayedHello));
}

#[tokio::test]
async fn strangers_are_told_apart() {
    for (stranger, expected) in [(&b"SSH-2.0-OpenSSH_9.2\r\n"[..], "plain"), (b"", "broke"), (b"\xc5culv", "broke")] {
        let (near, mut far) = duplex(1000);
        far.write_all(stranger).await.unwrap();
        far.shutdown().await.unwrap();
        let error = offer_new(Box::new(near), &daemon(1)).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_other_end_is_given_up_after_ten_seconds() {
    let (near, _far) = duplex(1000);
    let error = offer_new(Box::new(near), &daemon(1)).await.unwrap_err();
    assert!(matches!(error, HelloError::Timeout(TIMEOUT)), "{error}");
}

#[tokio::test]
async fn a_refused_session_says_why() {
    struct Full;
    impl LinkTable for Full {
        fn find(&self, _: &LinkId) -> Option<LinkControl> {
            None
        }
        fn admit(&self, _: &PeerHello) -> Result<(), String> {
            Err("16 services already".to_owned())
        }
    }
    let (near, far, _wire) = carrier();
    let (service, device) = (daemon(1), daemon(2));
    let (offered, received) = tokio::join!(offer_new(near, &service), receive(far, &device, &Full));
    assert_eq!(offered.unwrap_err().to_string(), "refused: 16 services already");
    assert!(matches!(received, Err(HelloError::Turned(Refusal::NotAdmitted(_)))));
}

#[tokio::test]
async fn one_budget_bounds_all_links_and_none_starves() {
    let budget = ReplayBudget::new(128 * 1024, 128 * 1024);
    let service = LocalHello { links: LinkSettings { budget: budget.clone(), ..LinkSettings::default() }, ..daemon(1) };
    let mut talks = JoinSet::new();
    let mut wires = Vec::new();
    for n in 0..4 {
        let (offered, received, wire) = begin(&service, &daemon(2)).await;
        wires.push(wire);
        let text = content(1_000_000, n);
        let device = talk(received.io, Vec::new());
        talks.spawn(async move {
            let (sent, got) = tokio::join!(talk(offered.io, text.clone()), device);
            sent.unwrap();
            assert!(got.unwrap() == text);
        });
    }
    while let Some(done) = talks.join_next().await {
        done.unwrap();
        assert!(budget.reserved() <= 128 * 1024);
    }
    assert_eq!(budget.reserved(), 0);
}
