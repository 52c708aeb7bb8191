//! OpenSSH through the tunnel: sessions, copies, and as a ProxyCommand.

use std::{fs, process::Command};

use crate::{
    programs::sshd::{HOST, Session, Sshd, user},
    support::{World, bytes, daemon::CULVERT, run},
};

/// Large enough that every window, buffer and counter on the way has been filled and turned over.
const GIBIBYTE: u64 = 1 << 30;

fn world(sshd: &Sshd) -> World {
    World::plan().target("ssh", sshd.address()).start()
}

#[test]
fn an_interactive_session_has_a_terminal() {
    let sshd = Sshd::start();
    let world = world(&sshd);
    let mut session = Session::open(&sshd, &world.port("ssh"));
    assert!(session.ask("tty").starts_with("/dev/pts/"));
    assert_eq!(session.ask("expr 6 '*' 7"), "42");
    assert!(session.ask("echo $SSH_CONNECTION").starts_with("127.0.0.1 "));
    assert_eq!(session.exit(7), Some(7));
}

#[test]
fn heavy_scp_copies_a_gibibyte_each_way() {
    let sshd = Sshd::start();
    let world = world(&sshd);
    let (near, far, back) = (world.hub.scratch().join("near"), sshd.far("far"), world.hub.scratch().join("back"));
    bytes::write_file(&near, 1, GIBIBYTE);
    let wanted = bytes::sha256_of(&near);
    let scp = || {
        let mut command = Command::new("scp");
        command.args(sshd.options()).args(["-q", "-P", &world.port("ssh")]);
        command
    };
    let there = |path: &std::path::Path| format!("{}@127.0.0.1:{}", user(), path.display());
    run(scp().arg(&near).arg(there(&far)));
    assert_eq!(bytes::sha256_of(&far), wanted);
    run(scp().arg(there(&far)).arg(&back));
    assert_eq!(bytes::sha256_of(&back), wanted);
}

#[test]
fn rsync_makes_a_tree_equal() {
    let sshd = Sshd::start();
    let world = world(&sshd);
    let near = world.hub.scratch().join("tree");
    for number in 0..200 {
        let folder = near.join(format!("folder-{}", number % 7));
        fs::create_dir_all(&folder).unwrap();
        bytes::write_file(&folder.join(format!("file-{number}")), number, number * 997);
    }
    bytes::write_file(&near.join("large"), 1, 32 << 20);
    let far = sshd.far("tree");
    let shell = ["ssh".to_owned(), "-p".into(), world.port("ssh")].into_iter().chain(sshd.options());
    let shell = shell.collect::<Vec<_>>().join(" ");
    let there = format!("{}@127.0.0.1:{}/", user(), far.display());
    let sync =
        || run(Command::new("rsync").args(["-a", "-I", "--delete", "-e", &shell]).arg(near.join("")).arg(&there));
    sync();
    run(Command::new("diff").arg("-r").arg(&near).arg(&far));
    // A change in the middle of a large file: rsync's own half-duplex chatter.
    let mut large = fs::read(near.join("large")).unwrap();
    large[9_999_999] ^= 1;
    fs::write(near.join("large"), large).unwrap();
    fs::remove_file(near.join("folder-1/file-1")).unwrap();
    sync();
    run(Command::new("diff").arg("-r").arg(&near).arg(&far));
}

#[test]
fn ssh_uses_connect_as_its_proxy_command() {
    let sshd = Sshd::start();
    let mut world = world(&sshd);
    // A name with capitals: ssh lower-cases %h, so that %n is the documented spelling.
    let proxy = format!("ProxyCommand={CULVERT} connect %n ssh --config {}", world.service.config().display());
    let ssh = || {
        let mut command = Command::new("ssh");
        command.args(sshd.options()).args(["-o", &proxy, "-l", &user(), HOST, "cat; echo $((40 + 2))"]);
        run(&mut command)
    };
    assert_eq!(ssh().trim(), "42");
    world.service.wait_for_line(&["culvert connect joined"]);
    // The same without a running daemon.
    world.service.stop();
    assert_eq!(ssh().trim(), "42");
}
