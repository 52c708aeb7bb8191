//! What the device offers: sshd, PostgreSQL, nginx and xrdp, each started for the test on the device's loopback.
//!
//! Owns their files and processes. Does not know culvert. Invariant: they run until the value is dropped.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};

use super::{
    daemons::{PATIENCE, Route},
    desktop::{self, Xrdp},
    lab::{Host, Lab, run},
};

/// Names and ports of the targets, and of the forwards that lead to them.
pub(crate) const ROUTES: [Route; 4] = [("ssh", 7022), ("sql", 7054), ("web", 7080), ("rdp", desktop::PORT)];
/// The file that is copied and downloaded.
pub(crate) const BIG_FILE: &str = "big";

/// The running targets.
pub(crate) struct Targets {
    running: Vec<Child>,
    pub(crate) xrdp: Xrdp,
    dir: PathBuf,
    /// SHA-256 of the big file.
    pub(crate) checksum: [u8; 32],
}

impl Targets {
    /// Starts them. The big file has this many MiB.
    pub(crate) fn start(lab: &Lab, mebibytes: usize) -> Self {
        let dir = lab.dir.clone();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        let make = format!("mkdir -p {0}/www && head -c {mebibytes}M /dev/urandom > {0}/www/{BIG_FILE}", dir.display());
        lab.sh(Host::Device, &make);
        let checksum = checksum(fs::File::open(dir.join("www").join(BIG_FILE)).unwrap());
        let running = vec![sshd(lab, &dir), postgres(lab, &dir), nginx(lab, &dir)];
        let xrdp = Xrdp::start(lab);
        wait_for_ports(lab);
        let sql = "createdb -h 127.0.0.1 -p 7054 -U postgres bench && \
            pgbench -q -i -h 127.0.0.1 -p 7054 -U postgres bench 2>&1";
        lab.sh(Host::Device, sql);
        Self { running, xrdp, dir, checksum }
    }

    /// The number that a query at the database itself yields.
    pub(crate) fn query(&self, lab: &Lab, sql: &str) -> i64 {
        let answer = lab.sh(Host::Device, &format!("psql -h 127.0.0.1 -p 7054 -U postgres -At -c '{sql}' bench"));
        answer.trim().parse().unwrap()
    }

    /// ssh's options: this key, and no questions.
    pub(crate) fn ssh_options(&self) -> Vec<String> {
        let known = format!("UserKnownHostsFile={}", self.dir.join("known_hosts").display());
        let options = ["StrictHostKeyChecking=no", &known, "BatchMode=yes", "LogLevel=ERROR", "ControlPath=none"];
        let key = self.dir.join("user_key").display().to_string();
        let mut words = vec!["-F".into(), "none".into(), "-i".into(), key];
        words.extend(options.into_iter().flat_map(|option| ["-o".to_owned(), option.to_owned()]));
        words
    }
}

impl Drop for Targets {
    fn drop(&mut self) {
        for child in &mut self.running {
            // PostgreSQL's children end with it; the lab ends what is left.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// SHA-256 of everything that comes.
pub(crate) fn checksum(mut bytes: impl std::io::Read) -> [u8; 32] {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match bytes.read(&mut buffer).unwrap() {
            0 => return hash.finalize().into(),
            count => hash.update(&buffer[..count]),
        }
    }
}

fn spawn(mut command: Command, dir: &Path, name: &str) -> Child {
    let log = fs::File::create(dir.join(format!("{name}.log"))).unwrap();
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

fn sshd(lab: &Lab, dir: &Path) -> Child {
    for key in ["host_key", "user_key"] {
        let made = run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(key)));
        assert!(made.status.success());
    }
    fs::create_dir_all("/run/sshd").unwrap();
    let dir_text = dir.display();
    let config = format!(
        "ListenAddress 127.0.0.1\nPort 7022\nHostKey {dir_text}/host_key\nAuthorizedKeysFile {dir_text}/user_key.pub\n\
         StrictModes no\nPermitRootLogin yes\nUsePAM no\nPidFile none\nSubsystem sftp internal-sftp\n"
    );
    fs::write(dir.join("sshd_config"), config).unwrap();
    let mut command = lab.on(Host::Device, "/usr/sbin/sshd");
    command.args(["-D", "-e", "-f"]).arg(dir.join("sshd_config"));
    spawn(command, dir, "sshd")
}

fn postgres(lab: &Lab, dir: &Path) -> Child {
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let bin = installed.map(|version| version.path().join("bin")).find(|bin| bin.join("initdb").exists());
    let program = |name: &str| bin.as_ref().map_or_else(|| name.into(), |bin| bin.join(name).display().to_string());
    let data = dir.join("pg");
    fs::create_dir(&data).unwrap();
    let owned = run(Command::new("chown").arg("postgres").arg(&data));
    assert!(owned.status.success());
    let mut init = lab.on(Host::Device, "runuser");
    init.args(["-u", "postgres", "--", &program("initdb"), "-N", "-A", "trust", "-U", "postgres", "-D"]).arg(&data);
    let init = run(&mut init);
    assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
    let mut command = lab.on(Host::Device, "runuser");
    command.args(["-u", "postgres", "--", &program("postgres"), "-F", "-h", "127.0.0.1", "-p", "7054", "-k", ""]);
    spawn(
        {
            command.arg("-D").arg(data);
            command
        },
        dir,
        "postgres",
    )
}

fn nginx(lab: &Lab, dir: &Path) -> Child {
    let dir_text = dir.display();
    let config = format!(
        "daemon off; master_process off; user root; pid {dir_text}/nginx.pid; error_log stderr;\nevents {{}}\n\
         http {{ access_log off; send_timeout 600s; server {{ listen 127.0.0.1:7080; root {dir_text}/www; }} }}\n"
    );
    fs::write(dir.join("nginx.conf"), config).unwrap();
    let mut command = lab.on(Host::Device, "/usr/sbin/nginx");
    command.arg("-e").arg("stderr").arg("-c").arg(dir.join("nginx.conf"));
    spawn(command, dir, "nginx")
}

fn wait_for_ports(lab: &Lab) {
    let deadline = Instant::now() + PATIENCE;
    for (name, port) in ROUTES {
        while lab.sh(Host::Device, &format!("ss -Htln 'sport = :{port}'")).trim().is_empty() {
            assert!(Instant::now() < deadline, "{name} does not listen");
            sleep(Duration::from_millis(50));
        }
    }
}
