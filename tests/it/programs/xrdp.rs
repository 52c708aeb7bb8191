//! A remote desktop: xrdp with a user who can log in, and xfreerdp on a screen of its own.

use std::{
    fs::{self, File},
    net::TcpStream,
    os::unix::fs::{PermissionsExt as _, chown},
    path::PathBuf,
    process::Command,
};

use crate::support::{Process, Scratch, eventually, port::free_port, process::output, run};

/// Where xrdp looks for its session manager; Debian's build reads no other place, and prefers IPv6 for loopback.
const SESSION_MANAGER: [&str; 2] = ["[::1]:3350", "127.0.0.1:3350"];

/// True if this process may make users, which a login needs; otherwise says so where nobody can miss it.
pub fn can_log_in() -> bool {
    let is_root = super::sshd::user() == "root";
    if !is_root {
        eprintln!("\n*** NOT TRIED: a remote desktop login needs root, to make the user who logs in ***\n");
    }
    is_root
}

/// A user of this machine, until the end of the story.
pub struct User {
    pub name: String,
    pub password: String,
    id: u32,
}

impl User {
    #[track_caller]
    pub fn add() -> Self {
        let name = format!("culvert-it-{}", std::process::id());
        let password = "drain-pipe-17".to_owned();
        run(Command::new("useradd").args(["--create-home", "--shell", "/bin/sh", &name]));
        let line = format!("echo '{name}:{password}' | chpasswd");
        run(Command::new("sh").args(["-c", &line]));
        let id = run(Command::new("id").args(["-u", &name])).trim().parse().unwrap();
        let user = Self { name, password, id };
        // The session that a login starts: leaves a note of its display and stays.
        let script = user.home().join("startwm.sh");
        fs::write(&script, "#!/bin/sh\necho \"$DISPLAY\" > \"$HOME/session\"\nexec sleep 1000000\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        chown(&script, Some(id), None).unwrap();
        user
    }

    fn home(&self) -> PathBuf {
        PathBuf::from("/home").join(&self.name)
    }

    /// The display of the session that runs in the user's name, if one does.
    pub fn session(&self) -> Option<String> {
        let display = fs::read_to_string(self.home().join("session")).ok().filter(|text| text.ends_with('\n'))?;
        let own = output(Command::new("pgrep").args(["-u", &self.id.to_string(), "-x", "sleep"]));
        own.status.success().then(|| display.trim().to_owned())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // In good order first: an X server that is killed leaves its socket, and its display counts as taken for ever.
        let id = self.id.to_string();
        let _ = output(Command::new("pkill").args(["-TERM", "-u", &id]));
        let is_gone = || {
            let own = output(Command::new("pgrep").args(["-u", &id, "-r", "R,S,D,T"]));
            (!own.status.success()).then_some(())
        };
        if !std::thread::panicking() {
            eventually("the user's processes to end", is_gone);
        }
        let _ = output(Command::new("pkill").args(["-KILL", "-u", &id]));
        let _ = output(Command::new("userdel").args(["--remove", "--force", &self.name]));
    }
}

/// A running xrdp with its session manager.
///
/// There is one at a time on a machine, because its session manager has a fixed port: a story waits for its turn.
pub struct Xrdp {
    _server: Process,
    _sessions: Process,
    port: u16,
    _scratch: Scratch,
    _turn: File,
}

impl Xrdp {
    #[track_caller]
    pub fn start() -> Self {
        let turn = File::create(std::env::temp_dir().join("culvert-it-xrdp.lock")).unwrap();
        turn.lock().unwrap();
        assert!(!answers_anywhere(), "an xrdp of this machine runs: stop it for the stories");
        let (scratch, port) = (Scratch::new(), free_port());
        let folder = scratch.path().display().to_string();
        let edits = [
            ("/etc/xrdp/sesman.ini", "LogFile=xrdp-sesman.log", format!("LogFile={folder}/sesman.log")),
            // Displays to choose from: more than the stories that were killed can have left as taken.
            ("/etc/xrdp/sesman.ini", "MaxSessions=50", "MaxSessions=1000".to_owned()),
            ("/etc/xrdp/xrdp.ini", "LogFile=xrdp.log", format!("LogFile={folder}/xrdp.log")),
            ("/etc/xrdp/xrdp.ini", "port=3389", format!("port=tcp://127.0.0.1:{port}")),
            ("/etc/xrdp/xrdp.ini", "autorun=", "autorun=Xorg".to_owned()),
        ];
        let configured = |shipped: &str, name: &str| {
            let text = fs::read_to_string(shipped).unwrap_or_else(|error| panic!("{shipped}: {error}"));
            let line = |line: &str| {
                let edit = edits.iter().find(|(file, old, _)| *file == shipped && *old == line);
                edit.map_or_else(|| line.to_owned(), |(_, _, new)| new.clone()) + "\n"
            };
            scratch.write(name, text.lines().map(line).collect::<String>())
        };
        let (sesman, xrdp) =
            (configured("/etc/xrdp/sesman.ini", "sesman.ini"), configured("/etc/xrdp/xrdp.ini", "xrdp.ini"));
        let daemon = |program: &str, config: &PathBuf| {
            Process::start(program, Command::new(program).args(["--nodaemon", "--config"]).arg(config))
        };
        let sessions = daemon("/usr/sbin/xrdp-sesman", &sesman);
        let server = daemon("/usr/sbin/xrdp", &xrdp);
        eventually("xrdp-sesman to listen", || answers_anywhere().then_some(()));
        eventually("xrdp to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
        Self { _server: server, _sessions: sessions, port, _scratch: scratch, _turn: turn }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

fn answers_anywhere() -> bool {
    SESSION_MANAGER.iter().any(|address| TcpStream::connect(address).is_ok())
}

/// xfreerdp on a virtual screen.
pub struct Desktop {
    client: Process,
    _screen: Process,
    _home: Scratch,
}

impl Desktop {
    /// Logs in at an address.
    #[track_caller]
    pub fn log_in(address: &str, user: &User) -> Self {
        let home = Scratch::new();
        let mut command = Command::new("Xvfb");
        // It finds a free display itself and writes its number.
        command.args(["-displayfd", "1", "-screen", "0", "1024x768x24", "-nolisten", "tcp"]);
        let screen = Process::start("Xvfb", &mut command);
        let number = eventually("Xvfb to name its display", || {
            screen.lines().into_iter().find(|line| !line.is_empty() && line.bytes().all(|byte| byte.is_ascii_digit()))
        });
        let mut command = Command::new("xfreerdp");
        command.env("DISPLAY", format!(":{number}")).env("HOME", home.path());
        command.args([&format!("/v:{address}"), &format!("/u:{}", user.name), &format!("/p:{}", user.password)]);
        command.args(["/cert:ignore", "/size:800x600", "/log-level:INFO"]);
        let client = Process::start("xfreerdp", &mut command);
        Self { client, _screen: screen, _home: home }
    }

    /// Waits for the session that the login started; its display at the far side.
    #[track_caller]
    pub fn wait_for_session(&mut self, user: &User) -> String {
        eventually("the desktop session", || {
            assert!(self.client.is_running(), "xfreerdp has ended");
            user.session()
        })
    }

    /// True while the client is connected.
    pub fn is_open(&mut self) -> bool {
        self.client.is_running()
    }
}
