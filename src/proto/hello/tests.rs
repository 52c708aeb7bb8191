//! Tests of the hello's format and proofs.

use super::*;

fn side() -> Side {
    Side { instance: InstanceId([1; 16]), boot: BootId([2; 16]), max_channels: 4096, receive_window: 1 << 20 }
}

fn resume() -> Resume {
    Resume {
        required: Features::LINK,
        instance: InstanceId([1; 16]),
        boot: BootId([2; 16]),
        link: LinkId([3; 16]),
        nonce: [4; 16],
        epoch: 7,
        positions: Positions { received: 99, consumed: 70 },
    }
}

fn messages() -> Vec<Message> {
    let link = NewLink { id: LinkId([3; 16]), secret: Secret::new([9; 32]), resume_for: Duration::from_secs(900) };
    let positions = Positions { received: 5, consumed: 4 };
    vec![
        Message::New { required: Features::NONE, optional: Features::LINK, side: side(), link: Some(link) },
        Message::New { required: Features::NONE, optional: Features::NONE, side: side(), link: None },
        Message::Resume(resume()),
        Message::Accept { agreed: Features::LINK, side: side(), resume_for: Duration::from_millis(1500) },
        Message::Answer { nonce: [4; 16], positions, proof: [5; 32] },
        Message::Refuse(Refusal::UnknownLink),
        Message::Refuse(Refusal::Stale),
        Message::Refuse(Refusal::SessionLost("expired".into())),
        Message::Refuse(Refusal::NotAdmitted("sixteen already".into())),
        Message::Refuse(Refusal::Unsupported("seal".into())),
        Message::Confirm { proof: [6; 32] },
    ]
}

#[test]
fn messages_survive_the_wire() {
    for message in messages() {
        let bytes = message.encode();
        assert_eq!(message_length(&bytes), Ok(Some(bytes.len())));
        assert_eq!(Message::decode(&bytes), Ok(message));
    }
}

/// The first release's bytes: a change here is a change of the wire.
#[test]
fn the_recorded_hello_of_release_0_1_is_understood() {
    let recorded = b"\xc5culvert\x00\x78\x01\x01\
        \x01\x04\0\0\0\0\x02\x04\0\0\0\x01\
        \x03\x10\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\
        \x04\x10\x02\x02\x02\x02\x02\x02\x02\x02\x02\x02\x02\x02\x02\x02\x02\x02\
        \x05\x04\0\0\x10\0\x06\x04\0\x10\0\0\
        \x07\x10\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03\
        \x08\x20\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\
        \x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\x09\
        \x09\x04\0\x0d\xbb\xa0";
    assert_eq!(Message::decode(recorded), Ok(messages().remove(0)));
    assert_eq!(messages().remove(0).encode(), recorded);
}

#[test]
fn a_message_cut_or_changed_anywhere_never_panics() {
    for message in messages() {
        let bytes = message.encode();
        for cut in 0..bytes.len() {
            assert!(Message::decode(&bytes[..cut]).is_err());
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 127, 255] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let _ = Message::decode(&changed);
            }
        }
    }
}

#[test]
fn a_stranger_is_recognised_by_his_first_bytes() {
    assert_eq!(message_length(b"S"), Err(HelloFault::Magic));
    assert_eq!(message_length(b"\xc5culvers"), Err(HelloFault::Magic));
    assert_eq!(message_length(b"\xc5culvert\x00"), Ok(None));
    assert_eq!(message_length(b"\xc5culvert\xff\xff"), Err(HelloFault::Length));
    assert_eq!(message_length(b"\xc5culvert\x00\x01"), Err(HelloFault::Length));
    let mut other = messages()[0].encode();
    other[PREFIX] = 2;
    assert_eq!(Message::decode(&other), Err(HelloFault::Version(2)));
}

#[test]
fn unknown_fields_are_ignored_and_doubled_ones_refused() {
    let mut writer = Writer::new(6);
    writer.field(tag::PROOF, &[6; 32]).field(200, b"from the future");
    assert_eq!(Message::decode(&writer.finish()), Ok(Message::Confirm { proof: [6; 32] }));
    let mut writer = Writer::new(6);
    writer.field(tag::PROOF, &[6; 32]).field(tag::PROOF, &[6; 32]);
    assert_eq!(Message::decode(&writer.finish()), Err(HelloFault::Field(tag::PROOF)));
}

#[test]
fn text_of_a_refusal_cannot_forge_log_lines() {
    let refusal = Message::Refuse(Refusal::NotAdmitted("no\nINFO all is well\x1b[2J".into()));
    let Ok(Message::Refuse(Refusal::NotAdmitted(text))) = Message::decode(&refusal.encode()) else { panic!() };
    assert_eq!(text, "noINFO all is well[2J");
}

fn exchange(service: &Secret, device: &Secret) -> Result<Resume, ResumeError> {
    let offer = ResumeOffer::new(&resume(), service.clone());
    let answer = ResumeAnswer::new(offer.hello(), resume(), device.clone(), [8; 16], Positions::default());
    let (_, confirm) = offer.answered(answer.answer())?;
    answer.confirmed(&confirm)
}

#[test]
fn both_sides_prove_the_secret() {
    let secret = Secret::new([7; 32]);
    assert_eq!(exchange(&secret, &secret), Ok(resume()));
    assert_eq!(exchange(&secret, &Secret::new([8; 32])), Err(ResumeError::WrongProof));
}

#[test]
fn a_changed_position_or_a_replayed_confirm_proves_nothing() {
    let secret = Secret::new([7; 32]);
    let offer = || ResumeOffer::new(&resume(), secret.clone());
    let answer =
        |nonce| ResumeAnswer::new(offer().hello(), resume(), secret.clone(), [nonce; 16], Positions::default());
    let mut changed = answer(1).answer().to_vec();
    let at = changed.len() - PROOF_FIELD - 1;
    changed[at] ^= 1;
    assert_eq!(offer().answered(&changed).unwrap_err(), ResumeError::WrongProof);

    let (_, confirm) = offer().answered(answer(1).answer()).unwrap();
    assert_eq!(answer(2).confirmed(&confirm), Err(ResumeError::WrongProof));
    let reflected = Message::Confirm { proof: answer(1).answer()[answer(1).answer().len() - 32..].try_into().unwrap() };
    assert_eq!(answer(1).confirmed(&reflected.encode()), Err(ResumeError::WrongProof));
}
