//! OpenSSH's server on a port, and its client through a forward.

use std::{fs, path::PathBuf, process::Command};

use crate::support::{Process, Scratch, port::free_port, run};

/// The name under which the client knows the host, whatever address a forward has.
pub const HOST: &str = "pump-17";

/// A running `sshd` with a host key, a user key and a configuration of its own.
pub struct Sshd {
    _process: Process,
    port: u16,
    scratch: Scratch,
}

impl Sshd {
    #[track_caller]
    pub fn start() -> Self {
        let (scratch, port) = (Scratch::new(), free_port());
        for key in ["host_key", "user_key"] {
            run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(scratch.join(key)));
        }
        fs::copy(scratch.join("user_key.pub"), scratch.join("authorized_keys")).unwrap();
        let host_key = fs::read_to_string(scratch.join("host_key.pub")).unwrap();
        scratch.write("known_hosts", format!("{HOST} {host_key}"));
        // Where the Debian package's unit would make it; without systemd nobody does.
        let _ = fs::create_dir_all("/run/sshd");
        let folder = scratch.path().display().to_string();
        let config = scratch.write(
            "sshd_config",
            format!(
                "ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n\
                 StrictModes no\nAuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\n\
                 PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\nUseDNS no\nMaxStartups 100\n"
            ),
        );
        let process = Process::start("sshd", Command::new("/usr/sbin/sshd").args(["-D", "-e", "-f"]).arg(config));
        process.wait_for_line(&["Server listening"]);
        Self { _process: process, port, scratch }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Options that `ssh`, `scp` and `rsync -e` share.
    pub fn options(&self) -> Vec<String> {
        let file = |name: &str| self.scratch.join(name).display().to_string();
        let mut words = vec!["-F".to_owned(), "none".into(), "-i".into(), file("user_key")];
        for option in [
            "BatchMode=yes".to_owned(),
            "StrictHostKeyChecking=yes".into(),
            format!("UserKnownHostsFile={}", file("known_hosts")),
            format!("HostKeyAlias={HOST}"),
        ] {
            words.extend(["-o".to_owned(), option]);
        }
        words
    }

    /// `ssh` through a forward's port.
    pub fn ssh(&self, port: &str) -> Command {
        let mut command = Command::new("ssh");
        command.args(self.options()).args(["-p", port, "-l", &user(), "127.0.0.1"]);
        command
    }

    /// A file on the far side's disk.
    pub fn far(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }
}

/// Who runs the stories.
pub fn user() -> String {
    run(Command::new("id").arg("-un")).trim().to_owned()
}

/// An interactive session with a terminal.
pub struct Session {
    process: Process,
    questions: u32,
}

impl Session {
    /// `ssh -tt` through a forward's port.
    #[track_caller]
    pub fn open(sshd: &Sshd, port: &str) -> Self {
        let mut command = sshd.ssh(port);
        command.args(["-tt", "exec /bin/sh -i"]);
        Self { process: Process::start("ssh -tt", &mut command), questions: 0 }
    }

    /// Types a command and returns what it printed.
    #[track_caller]
    pub fn ask(&mut self, command: &str) -> String {
        self.questions += 1;
        let (said, number) = (self.process.said(), self.questions);
        // The terminal echoes the command line; the answer is told apart by arithmetic that only a shell does.
        self.process.type_in(&format!("echo \"answer $(({number} + 1000)): $({command})\"\n"));
        let mark = format!("answer {}: ", number + 1000);
        let line = self.process.wait_for_line_after(said, &[&mark]);
        line.split(&mark).nth(1).unwrap().trim().to_owned()
    }

    /// Types `exit CODE`; the client's exit code.
    #[track_caller]
    pub fn exit(mut self, code: u8) -> Option<i32> {
        self.process.type_in(&format!("exit {code}\n"));
        self.process.wait()
    }
}
