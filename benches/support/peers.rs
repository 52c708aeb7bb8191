//! What is compared: programs that lead from a port of loopback to the target, each in processes of its own.

use std::{
    fs,
    io::{self, Write as _},
    net::{SocketAddr, TcpListener},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const CULVERT: &str = env!("CARGO_BIN_EXE_culvert");
/// For a daemon to start, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running tunnel. Dropped, its processes end.
pub(crate) struct Peer {
    /// Where clients connect.
    pub(crate) near: SocketAddr,
    pub(crate) processes: Processes,
    _folder: Folder,
}

/// Processes that end when this is dropped.
#[derive(Default)]
pub(crate) struct Processes(Vec<Child>);

impl Processes {
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.0.iter().map(Child::id).collect()
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in self.0.iter_mut().rev() {
            // One that has ended by itself is what we want.
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

/// A temporary folder.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("culvert-bench-{}-{name}", std::process::id()));
        // Left over from a run that was killed.
        let _ = fs::remove_dir_all(&path);
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is in the temporary folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Three plain TCP relays in a row: what any tunnel over a relay must pay.
pub(crate) fn relays(target: SocketAddr) -> io::Result<Peer> {
    let folder = Folder::new("relays")?;
    let (mut processes, mut to) = (Processes::default(), target);
    for _ in 0..3 {
        let listen = free()?;
        let this = std::env::current_exe()?;
        processes.0.push(start(
            Command::new(this).args(["relay", &listen.to_string(), &to.to_string()]),
            &folder,
            "relay",
        )?);
        wait_for(listen, &mut processes)?;
        to = listen;
    }
    Ok(Peer { near: to, processes, _folder: folder })
}

/// `ssh -L` to an sshd, to which the device's `ssh -R` leads: two encrypted hops, in culvert's topology.
pub(crate) fn ssh(target: SocketAddr) -> io::Result<Peer> {
    let folder = Folder::new("ssh")?;
    for key in ["host", "user"] {
        run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", &folder.file(key)]))?;
    }
    let (sshd, middle, near) = (free()?, free()?, free()?);
    let mut config = fs::File::create(folder.0.join("sshd.conf"))?;
    writeln!(
        config,
        "ListenAddress {sshd}\nHostKey {}\nAuthorizedKeysFile {}",
        folder.file("host"),
        folder.file("user.pub")
    )?;
    writeln!(config, "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nMaxStartups 100\nUseDNS no")?;
    let mut processes = Processes::default();
    let mut command = Command::new("/usr/sbin/sshd");
    processes.0.push(start(command.args(["-D", "-e", "-f", &folder.file("sshd.conf")]), &folder, "sshd")?);
    wait_for(sshd, &mut processes)?;
    let user = String::from_utf8_lossy(&Command::new("id").arg("-un").output()?.stdout).trim().to_owned();
    for (forward, port) in
        [(["-R", &format!("{middle}:{target}")], middle), (["-L", &format!("{near}:{middle}")], near)]
    {
        let mut command = Command::new("ssh");
        command.args(["-N", "-F", "none", "-c", "aes128-gcm@openssh.com", "-i", &folder.file("user"), "-p"]);
        command.arg(sshd.port().to_string()).args(["-o", "StrictHostKeyChecking=no", "-o", "BatchMode=yes"]);
        command.args(["-o", "UserKnownHostsFile=/dev/null", "-o", "ExitOnForwardFailure=yes"]).args(forward);
        processes.0.push(start(command.arg(format!("{user}@127.0.0.1")), &folder, "ssh")?);
        wait_for(port, &mut processes)?;
    }
    Ok(Peer { near, processes, _folder: folder })
}

/// bore, from the crate registry (`cargo install bore-cli`): one hop without encryption, a connection each.
pub(crate) fn bore(target: SocketAddr) -> io::Result<Peer> {
    // Its server's own port is fixed.
    let server = SocketAddr::from(([127, 0, 0, 1], 7835));
    let (folder, near) = (Folder::new("bore")?, free()?);
    let mut processes = Processes::default();
    let mut command = Command::new("bore");
    processes.0.push(start(command.args(["server", "--bind-addr", "127.0.0.1"]), &folder, "server")?);
    wait_for(server, &mut processes)?;
    let mut command = Command::new("bore");
    command.args(["local", &target.port().to_string(), "--to", "127.0.0.1", "--port", &near.port().to_string()]);
    processes.0.push(start(&mut command, &folder, "local")?);
    wait_for(near, &mut processes)?;
    Ok(Peer { near, processes, _folder: folder })
}

/// Hub, device and service, each with the configuration that a person would write.
pub(crate) fn culvert(target: SocketAddr) -> io::Result<Peer> {
    culvert_with(target, 4096, "")
}

/// The same without the resumable link.
pub(crate) fn without_link(target: SocketAddr) -> io::Result<Peer> {
    culvert_with(target, 4096, "resume_for = \"0s\"\n")
}

/// The same, for so many connections at once, and with `more` settings in both daemons.
pub(crate) fn culvert_with(target: SocketAddr, connections: usize, more: &str) -> io::Result<Peer> {
    let (hub, mut processes) = Hub::start()?;
    let near = free()?;
    let folder = &hub.folder;
    write(
        folder,
        "device.toml",
        &format!(
            "{}\n[limits]\nmax_connections = {connections}\nmax_channels = {connections}\n\
             [[target]]\nname = \"load\"\naddress = \"{target}\"\nmax_connections = {connections}\n",
            hub.common("device", more)
        ),
    )?;
    let forward = format!(
        "\n[limits]\nmax_connections = {connections}\nmax_connections_per_device = {connections}\n\
         max_channels = {connections}\n[[forward]]\nname = \"load\"\nlisten = \"{near}\"\ndevice = \"{DEVICE}\"\ntarget = \"load\"\n\
         max_connections = {connections}\n"
    );
    write(folder, "service.toml", &(hub.common("service", more) + &forward))?;
    for role in ["device", "service"] {
        let file = folder.file(&format!("{role}.toml"));
        processes.0.push(start(Command::new(CULVERT).args([role, "--config", &file]), folder, role)?);
    }
    wait_for(near, &mut processes)?;
    Ok(Peer { near, processes, _folder: hub.folder })
}

/// The device's ID.
pub(crate) const DEVICE: &str = "bench-device";

/// A hub with one registered device and one policy for services.
pub(crate) struct Hub {
    pub(crate) folder: Folder,
}

impl Hub {
    /// Makes and starts a hub; registers the device.
    pub(crate) fn start() -> io::Result<(Self, Processes)> {
        let folder = Folder::new("culvert")?;
        let listen = free()?;
        let dir = folder.0.display().to_string();
        let listens = listen.to_string();
        let init =
            ["hub", "init", "--dir", &dir, "--hostname", "127.0.0.1", "--listen", &listens, "--mqtt-listen", "off"];
        let said = run(Command::new(CULVERT).args(init))?;
        let service = said.lines().find(|line| line.starts_with("HostName=")).unwrap_or_default();
        write(&folder, "service.connection", service)?;
        let mut config = fs::OpenOptions::new().append(true).open(folder.0.join("hub.toml"))?;
        config.write_all(b"\n[metrics]\nlisten = \"off\"\n")?;
        let mut command = Command::new(CULVERT);
        let mut processes = Processes::default();
        processes.0.push(start(command.args(["hub", "--config", &folder.file("hub.toml")]), &folder, "hub")?);
        wait_for(listen, &mut processes)?;
        let owner = folder.file("owner.connection");
        let mut register = Command::new(CULVERT);
        register.args(["registry", "--connection-string-file", &owner, "--ca-file", &folder.file("ca.pem")]);
        let device = run(register.args(["add", DEVICE]))?;
        let device = device.lines().find(|line| line.starts_with("HostName=")).unwrap_or_default();
        write(&folder, "device.connection", device)?;
        Ok((Self { folder }, processes))
    }

    fn common(&self, role: &str, more: &str) -> String {
        let inside = |name: &str| self.folder.file(&format!("{role}{name}"));
        format!(
            "connection_string_file = \"{role}.connection\"\nca_file = \"ca.pem\"\nstate_dir = \"{}\"\n\
             control_socket = \"{}\"\n{more}[metrics]\nlisten = \"off\"\n",
            inside("-state"),
            inside(".sock"),
        )
    }
}

/// An address that was free a moment ago.
pub(crate) fn free() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

fn write(folder: &Folder, name: &str, text: &str) -> io::Result<()> {
    let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(folder.0.join(name));
    file?.write_all(text.as_bytes())
}

fn start(command: &mut Command, folder: &Folder, name: &str) -> io::Result<Child> {
    // Not beside the configuration: the daemons watch that folder.
    let logs = folder.0.join("logs");
    fs::create_dir_all(&logs)?;
    let log = logs.join(format!("{name}.log"));
    let log = fs::OpenOptions::new().create(true).append(true).open(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().map_err(|error| io::Error::other(format!("{name}: {error}")))
}

fn run(command: &mut Command) -> io::Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(io::Error::other(format!("{:?}: {said}", command.get_program())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Until the port is listened on, which is seen without connecting to it.
fn wait_for(port: SocketAddr, processes: &mut Processes) -> io::Result<()> {
    let (begin, listening) = (Instant::now(), format!(":{:04X} 00000000:0000 0A", port.port()));
    while begin.elapsed() < PATIENCE {
        if fs::read_to_string(Path::new("/proc/net/tcp"))?.contains(&listening) {
            return Ok(());
        }
        for child in &mut processes.0 {
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("a process ended before it listened: {status}")));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(io::ErrorKind::TimedOut.into())
}
