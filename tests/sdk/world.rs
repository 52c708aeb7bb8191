//! The world of a story: namespaces, a hub on 443 and 8883, daemons, and client programs.
//!
//! Owns processes and files. Does not know any protocol. Invariant: when the story ends, however it ends, every
//! process that it started ends too (`unshare --kill-child`).

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The hub's name, which only the namespaces' hosts file knows.
pub(crate) const HUB: &str = "hub.culvert.test";
/// Another name that leads to the hub, as a gateway on the way would have it.
pub(crate) const GATEWAY: &str = "gateway.culvert.test";
const CULVERT: &str = env!("CARGO_BIN_EXE_culvert");
const TESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdk");
/// Set inside the namespaces.
const INSIDE: &str = "CULVERT_SDK_INSIDE";
/// A client that takes longer hangs: the slowest story waits for time-outs of a few seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Enters the namespaces: runs this test alone in them as a child, or, in that child, the story itself.
pub(crate) fn story(name: &str, tell: impl FnOnce(&mut World)) {
    if std::env::var_os(INSIDE).is_some() {
        let mut world = World::start();
        tell(&mut world);
        return world.end();
    }
    let folder = std::env::temp_dir().join(format!("culvert-sdk-{}-{}", std::process::id(), name.replace("::", "-")));
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("hosts"), format!("127.0.0.1 localhost {HUB} {GATEWAY}\n::1 localhost\n")).unwrap();
    let enter = "ip link set lo up && mount --bind \"$CULVERT_SDK_INSIDE/hosts\" /etc/hosts && exec \"$@\"";
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(rootless())
        .args(["sh", "-c", enter, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, &folder)
        .output()
        .expect("unshare (util-linux) is installed");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "the story failed, its files are in {}", folder.display());
    assert!(said.contains("1 passed"), "there is no test {name}");
    fs::remove_dir_all(&folder).unwrap();
}

/// Namespaces are root's to make; others need one of users around them.
fn rootless() -> &'static [&'static str] {
    use std::os::unix::fs::MetadataExt as _;
    if fs::metadata("/proc/self").unwrap().uid() == 0 { &[] } else { &["--map-root-user"] }
}

/// Declares stories as tests: the name is needed to find them again inside the namespaces.
macro_rules! stories {
    ($(fn $name:ident($world:ident) $body:block)*) => { $(
        #[test]
        fn $name() {
            let name = concat!(module_path!(), "::", stringify!($name)).split_once("::").unwrap().1;
            $crate::world::story(name, |$world| $body);
        }
    )* };
}
pub(crate) use stories;

/// A running hub and what was started beside it.
pub(crate) struct World {
    folder: PathBuf,
    daemons: Vec<(&'static str, Child)>,
}

impl World {
    fn start() -> Self {
        let folder = PathBuf::from(std::env::var_os(INSIDE).unwrap()).join("world");
        fs::create_dir(&folder).unwrap();
        let mut world = Self { folder, daemons: Vec::new() };
        let said = world.succeed(&[
            "hub",
            "init",
            "--dir",
            world.path("").to_str().unwrap(),
            "--hostname",
            HUB,
            "--also",
            GATEWAY,
        ]);
        world.write("service.connection", said.trim().lines().last().unwrap());
        world.daemon("hub", "hub.toml");
        world
    }

    /// A file of the world.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes a file.
    pub(crate) fn write(&self, name: &str, contents: &str) {
        fs::write(self.path(name), contents).unwrap();
    }

    /// Registers a device and keeps its connection string in `NAME.connection`, slashes as dashes.
    pub(crate) fn register(&self, identity: &str) {
        self.register_with(identity, &[]);
    }

    /// The same with options of `registry add`.
    pub(crate) fn register_with(&self, identity: &str, options: &[&str]) {
        let text = self.succeed(&[&["registry", "add", identity], options].concat());
        self.write(&format!("{}.connection", identity.replace('/', "-")), text.trim());
    }

    /// Runs a culvert command that must succeed, as the hub's owner.
    pub(crate) fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.culvert(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "culvert {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a culvert command as the hub's owner.
    pub(crate) fn culvert(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(CULVERT);
        command.args(arguments).env("CULVERT_CONNECTION_STRING_FILE", self.path("owner.connection"));
        finish(command, "culvert")
    }

    /// Starts a daemon and waits until it says that it is ready.
    pub(crate) fn daemon(&mut self, role: &'static str, config: &str) {
        let (socket, log) = (self.path(&format!("{config}.notify")), fs::File::create(self.log(role)).unwrap());
        let notified = UnixDatagram::bind(&socket).unwrap();
        notified.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = Command::new(CULVERT)
            .args([role, "--config"])
            .arg(self.path(config))
            .env("NOTIFY_SOCKET", &socket)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemons.push((role, child));
        let mut said = [0; 4096];
        loop {
            let size = notified.recv(&mut said).unwrap_or_else(|_| panic!("{role}: {}", self.said(role)));
            if said[..size].split(|&byte| byte == b'\n').any(|line| line == b"READY=1") {
                return;
            }
        }
    }

    /// A device daemon with targets, each `name = "address"` and more keys.
    pub(crate) fn device(&mut self, identity: &str, targets: &[&str]) {
        self.device_with(identity, "", targets);
    }

    /// The same with more keys.
    pub(crate) fn device_with(&mut self, identity: &str, keys: &str, targets: &[&str]) {
        let targets: String = targets.iter().map(|target| format!("[[target]]\n{target}\n")).collect();
        let targets = format!("{keys}\n{targets}");
        self.configured("device", &format!("{}.connection", identity.replace('/', "-")), &targets);
    }

    /// A service daemon with forwards.
    pub(crate) fn service(&mut self, forwards: &[&str]) {
        let forwards: String = forwards.iter().map(|forward| format!("[[forward]]\n{forward}\n")).collect();
        self.configured("service", "service.connection", &forwards);
    }

    fn configured(&mut self, role: &'static str, strings: &str, rules: &str) {
        let state = self.path(role);
        fs::create_dir(&state).unwrap();
        let (state, socket) = (state.display().to_string(), self.path(&format!("{role}.sock")).display().to_string());
        let config = format!(
            "connection_string_file = \"{strings}\"\nca_file = \"ca.pem\"\nstate_dir = \"{state}\"\n\
             control_socket = \"{socket}\"\n{rules}\n[log]\nlevel = \"debug\"\n"
        );
        self.write(&format!("{role}.toml"), &config);
        self.daemon(role, &format!("{role}.toml"));
    }

    /// Ends a daemon and starts it again with a changed configuration.
    pub(crate) fn restart(&mut self, role: &'static str, change: impl FnOnce(String) -> String) {
        let place = self.daemons.iter().position(|(name, _)| *name == role).unwrap();
        let (_, mut child) = self.daemons.remove(place);
        child.kill().unwrap();
        child.wait().unwrap();
        let config = format!("{role}.toml");
        self.write(&config, &change(fs::read_to_string(self.path(&config)).unwrap()));
        fs::remove_file(self.path(&format!("{config}.notify"))).unwrap();
        self.daemon(role, &config);
    }

    /// A number that the hub shows on its metrics port.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let mut socket = TcpStream::connect("127.0.0.1:9464").unwrap();
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().parse().unwrap()
    }

    /// A daemon's process.
    pub(crate) fn process(&self, role: &str) -> u32 {
        self.daemons.iter().find(|(name, _)| *name == role).unwrap().1.id()
    }

    fn log(&self, role: &str) -> PathBuf {
        self.path(&format!("{role}.log"))
    }

    /// What a daemon has logged.
    pub(crate) fn said(&self, role: &str) -> String {
        fs::read_to_string(self.log(role)).unwrap()
    }

    /// Runs a Python client that must succeed, and gives what it printed.
    pub(crate) fn python(&self, script: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(self.python_program());
        command.arg(Path::new(TESTS).join("python").join(script)).args(arguments);
        self.client(command, script)
    }

    fn python_program(&self) -> PathBuf {
        Path::new(TESTS).join("../.cache/sdk-venv/bin/python")
    }

    /// Runs a Node client that must succeed, and gives what it printed.
    pub(crate) fn node(&self, script: &str, arguments: &[&str]) -> String {
        let mut command = Command::new("node");
        command.arg(Path::new(TESTS).join("node").join(script)).args(arguments);
        self.client(command, script)
    }

    /// Starts a Node or Python program (by its suffix) that runs until the story ends; waits for its first line.
    pub(crate) fn background(&mut self, script: &str, arguments: &[&str]) {
        let mut command = if script.ends_with(".py") {
            let mut command = Command::new(self.python_program());
            command.arg("-u").arg(Path::new(TESTS).join("python").join(script));
            command
        } else {
            let mut command = Command::new("node");
            command.arg(Path::new(TESTS).join("node").join(script));
            command
        };
        self.environment(&mut command);
        self.spawn_and_wait(command.args(arguments), script);
    }

    /// Starts a program and waits for its first line.
    pub(crate) fn spawn_and_wait(&mut self, command: &mut Command, name: &str) {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = lines.next().unwrap_or_else(|| panic!("{name} ended")).unwrap();
        println!("{name}: {first}");
        let name = name.to_owned();
        // Ends with the program.
        thread::spawn(move || lines.map_while(Result::ok).for_each(|line| println!("{name}: {line}")));
        self.daemons.push(("client", child));
    }

    /// Waits until a daemon has logged a text.
    pub(crate) fn until(&self, role: &str, text: &str) {
        let began = Instant::now();
        while !self.said(role).contains(text) {
            assert!(began.elapsed() < PATIENCE, "{role} never said {text:?}:\n{}", self.said(role));
            // Between two looks at a file: nothing tells when another process has written.
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn client(&self, mut command: Command, script: &str) -> String {
        self.environment(&mut command);
        let output = finish(command, script);
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        println!("{said}");
        assert!(output.status.success(), "{script}: {}\n{said}\nhub:\n{}", output.status, self.said("hub"));
        said
    }

    /// What a client's environment tells: where the files are, and whom to trust.
    pub(crate) fn environment(&self, command: &mut Command) {
        command
            .env("WORLD", &self.folder)
            .env("NODE_EXTRA_CA_CERTS", self.path("ca.pem"))
            .env("PYTHONDONTWRITEBYTECODE", "1");
    }

    /// Every key that this world knows, and what every token contains.
    fn secrets(&self) -> Vec<String> {
        let files = fs::read_dir(&self.folder).unwrap().map(|entry| entry.unwrap().path());
        let strings = files.filter(|path| path.extension().is_some_and(|kind| kind == "connection"));
        let texts = strings.map(|path| fs::read_to_string(path).unwrap());
        let keys = texts.filter_map(|text| Some(text.trim().split_once("SharedAccessKey=")?.1.to_owned()));
        keys.chain(["&sig=".to_owned()]).collect()
    }

    /// No daemon died, panicked or printed a secret.
    fn end(mut self) {
        assert_eq!(self.metric("culvert_hub_task_panics_total"), 0.0);
        for (role, mut child) in std::mem::take(&mut self.daemons) {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none() || role == "client", "{role} ended by itself: {ended:?}\n{}", self.said(role));
            child.kill().unwrap();
            child.wait().unwrap();
            if role != "client" {
                let said = self.said(role);
                assert!(!said.contains("panicked"), "{role}: {said}");
                let secret = self.secrets().into_iter().find(|secret| said.contains(secret));
                assert_eq!(secret, None, "{role} printed a secret");
            }
        }
    }
}

/// Runs a program to its end, within a limit.
fn finish(mut command: Command, name: &str) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}; was tests/sdk/install run?"));
    let (id, began) = (child.id().to_string(), Instant::now());
    let (done, watched) = std::sync::mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if watched.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            // It may have ended at this very moment.
            let _ = Command::new("kill").args(["-9", &id]).status();
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(done);
    watchdog.join().unwrap();
    assert!(began.elapsed() < PATIENCE, "{name} hung: {output:?}");
    output
}

/// A local server that sends back all that it reads, and ends when the client has ended.
pub(crate) fn echo_server(address: &str) {
    let listener = TcpListener::bind(address).unwrap();
    // Ends with the process.
    thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let (mut reader, mut writer) = (socket.try_clone().unwrap(), socket);
                // A reset is an end too.
                let _ = std::io::copy(&mut reader, &mut writer);
                let _ = writer.shutdown(Shutdown::Write);
            });
        }
    });
}

/// Sends `data` through a local port and reads as much back.
pub(crate) fn echoed(address: &str, data: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut writer, copy) = (socket.try_clone().unwrap(), data.to_vec());
    let writing = thread::spawn(move || writer.write_all(&copy).unwrap());
    let mut back = vec![0; data.len()];
    socket.read_exact(&mut back).unwrap();
    writing.join().unwrap();
    back
}
