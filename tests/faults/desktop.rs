//! A remote desktop through the tunnel: xrdp with a session of its own at the device, xfreerdp on a virtual screen at
//! the service.
//!
//! Owns the user who logs in, and the programs on both sides. Does not know culvert. Invariant: each line that the
//! viewer's side prints is a move of the pointer there that the desktop has answered with a colour here.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread::{JoinHandle, sleep, spawn},
    time::{Duration, Instant},
};

use super::{
    daemons::PATIENCE,
    lab::{Host, Lab, run},
};

/// xrdp's port at the device, and the forward's at the service.
pub(crate) const PORT: u16 = 7389;
const SCRIPT: &str = include_str!("desktop.py");
const PASSWORD: &str = "drain-pipe-17";

/// xrdp and its session manager on the device, and a user who may log in.
pub(crate) struct Xrdp {
    user: User,
    running: Vec<Child>,
}

impl Xrdp {
    pub(crate) fn start(lab: &Lab) -> Self {
        let user = User::add(lab);
        let dir = lab.dir.display().to_string();
        let edits = [
            ("LogFile=xrdp-sesman.log", format!("LogFile={dir}/sesman.log")),
            // Displays to choose from: more than the stories that were killed can have left as taken.
            ("MaxSessions=50", "MaxSessions=1000".to_owned()),
            ("LogFile=xrdp.log", format!("LogFile={dir}/xrdp.log")),
            ("port=3389", format!("port=tcp://127.0.0.1:{PORT}")),
            ("autorun=", "autorun=Xorg".to_owned()),
        ];
        let daemon = |program: &str, config: &str| {
            let shipped = fs::read_to_string(Path::new("/etc/xrdp").join(config)).unwrap();
            let line = |line: &str| {
                let edit = edits.iter().find(|(old, _)| *old == line);
                edit.map_or_else(|| line.to_owned(), |(_, new)| new.clone()) + "\n"
            };
            let own = lab.dir.join(config);
            fs::write(&own, shipped.lines().map(line).collect::<String>()).unwrap();
            let mut command = lab.on(Host::Device, program);
            command.args(["--nodaemon", "--config"]).arg(own);
            background(&mut command, lab, config)
        };
        let sessions = daemon("/usr/sbin/xrdp-sesman", "sesman.ini");
        let server = daemon("/usr/sbin/xrdp", "xrdp.ini");
        Self { user, running: vec![server, sessions] }
    }
}

impl Drop for Xrdp {
    fn drop(&mut self) {
        end(&mut self.running);
    }
}

/// A user of this machine, until the end of the lab.
struct User {
    name: String,
    id: u32,
}

impl User {
    fn add(lab: &Lab) -> Self {
        let name = format!("culvert-faults-{}", std::process::id());
        must(Command::new("useradd").args(["--create-home", "--shell", "/bin/sh", &name]));
        must(Command::new("sh").args(["-c", &format!("echo '{name}:{PASSWORD}' | chpasswd")]));
        let id = must(Command::new("id").args(["-u", &name])).trim().parse().unwrap();
        let script = lab.dir.join("desktop.py");
        fs::write(&script, SCRIPT).unwrap();
        // What a login starts.
        let session = Path::new("/home").join(&name).join("startwm.sh");
        fs::write(&session, format!("#!/bin/sh\nexec python3 {} paint\n", script.display())).unwrap();
        fs::set_permissions(&session, fs::Permissions::from_mode(0o755)).unwrap();
        chown(&session, Some(id), None).unwrap();
        Self { name, id }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // In good order first: an X server that is killed leaves its socket, and its display counts as taken for ever.
        let own = self.id.to_string();
        run(Command::new("pkill").args(["-TERM", "-u", &own]));
        let begun = Instant::now();
        while run(Command::new("pgrep").args(["-u", &own])).status.success() && begun.elapsed() < PATIENCE {
            sleep(Duration::from_millis(50));
        }
        run(Command::new("pkill").args(["-KILL", "-u", &own]));
        run(Command::new("userdel").args(["--remove", "--force", &self.name]));
    }
}

/// The viewer, and the hand that moves its pointer.
pub(crate) struct Desktop {
    running: Vec<Child>,
    answers: Arc<Mutex<Vec<Instant>>>,
    reader: Option<JoinHandle<()>>,
}

impl Desktop {
    /// Logs in, and waits until the desktop answers.
    pub(crate) fn open(lab: &Lab, xrdp: &Xrdp) -> Self {
        let (mut screen, display) = screen(lab);
        let on_screen = |program: &str| {
            let mut command = lab.on(Host::Service, program);
            command.env("DISPLAY", &display).env("HOME", &lab.dir).env_remove("XAUTHORITY");
            command
        };
        let mut viewer = on_screen("xfreerdp");
        viewer.args([&format!("/v:127.0.0.1:{PORT}"), &format!("/u:{}", xrdp.user.name), &format!("/p:{PASSWORD}")]);
        viewer.args(["/cert:ignore", "/size:800x600", "/log-level:INFO"]);
        let viewer = background(&mut viewer, lab, "xfreerdp");
        let mut hand = on_screen("python3");
        hand.arg(lab.dir.join("desktop.py")).arg("point").arg(framebuffer(lab)).stdout(Stdio::piped());
        let mut hand = hand.spawn().unwrap();
        let answers = Arc::<Mutex<Vec<Instant>>>::default();
        let lines = BufReader::new(hand.stdout.take().unwrap()).lines();
        let reader = {
            let answers = answers.clone();
            spawn(move || lines.map_while(Result::ok).for_each(|_| answers.lock().unwrap().push(Instant::now())))
        };
        screen.extend([viewer, hand]);
        let mut desktop = Self { running: screen, answers, reader: Some(reader) };
        // A few, so that the pointer has been everywhere and no colour was there by chance.
        desktop.wait_answers(Instant::now(), 10, PATIENCE * 2).expect("a remote desktop that answers");
        desktop
    }

    /// Waits for so many answers after `since`.
    pub(crate) fn wait_answers(&mut self, since: Instant, count: usize, limit: Duration) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            if let Some(fault) = self.fault() {
                return Err(fault);
            }
            if self.answers.lock().unwrap().iter().rev().take_while(|at| **at > since).count() >= count {
                return Ok(());
            }
            if begun.elapsed() > limit {
                return Err(format!("the desktop has not answered for {limit:?}"));
            }
            sleep(Duration::from_millis(50));
        }
    }

    fn fault(&mut self) -> Option<String> {
        let ended = self.running.iter_mut().find_map(|child| child.try_wait().unwrap());
        ended.map(|status| format!("the screen, the viewer or the hand at its pointer ended: {status}"))
    }

    /// Closes it; gives how often the desktop answered, and what was wrong.
    pub(crate) fn finish(mut self) -> (usize, Option<String>) {
        let fault = self.fault();
        let answers = self.answers.lock().unwrap().len();
        (answers, fault)
    }
}

impl Drop for Desktop {
    fn drop(&mut self) {
        end(&mut self.running);
        self.reader.take().into_iter().for_each(|reader| drop(reader.join()));
    }
}

fn framebuffer(lab: &Lab) -> PathBuf {
    lab.dir.join("Xvfb_screen0")
}

/// A virtual screen at the service, and its name.
fn screen(lab: &Lab) -> (Vec<Child>, String) {
    let mut command = lab.on(Host::Service, "Xvfb");
    // It finds a free display itself and writes its number.
    command.args(["-displayfd", "1", "-screen", "0", "1024x768x24", "-nolisten", "tcp", "-fbdir"]).arg(&lab.dir);
    let log = fs::File::create(lab.dir.join("Xvfb.log")).unwrap();
    let mut screen = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
    let mut number = String::new();
    BufReader::new(screen.stdout.take().unwrap()).read_line(&mut number).unwrap();
    (vec![screen], format!(":{}", number.trim()))
}

fn background(command: &mut Command, lab: &Lab, name: &str) -> Child {
    let log = fs::File::create(lab.dir.join(format!("{name}.log"))).unwrap();
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

fn end(running: &mut Vec<Child>) {
    for mut child in running.drain(..).rev() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn must(command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
