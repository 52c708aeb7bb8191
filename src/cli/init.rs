//! `culvert hub init`: everything a new hub needs, in one folder.
//!
//! Owns the names, contents and modes of the files. Does not know how the hub reads them.
//! Invariant: nothing that exists is overwritten, and a key's file never exists with a wider mode than its last.

use std::{
    fs,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, chown},
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::{
    args::InitArgs,
    exit::{Failure, Outcome},
    pki, say,
};
use crate::{
    auth::{ConnectionString, Credential, Owner, key, policy},
    base::{Name, Secret},
    config::host_is_valid,
    transport::tls::ServerTls,
};

/// The group whose members may read the daemons' secrets, made by the Debian package's sysusers.d file.
pub(super) const GROUP: &str = "culvert";
/// The folder that the units read; elsewhere state and socket stay in the folder itself.
const SYSTEM_DIR: &str = "/etc/culvert";
/// The owner's connection string: `culvert registry` looks for it here.
pub(super) const OWNER_FILE: &str = "owner.connection";
/// The authority's certificate, which devices and services need.
pub(super) const CA_FILE: &str = "ca.pem";
/// Bytes of a policy key: the block in and out of HMAC-SHA256, and what IoT Hub makes.
const KEY_BYTES: usize = 32;

/// What a hub is made from.
pub(super) struct Plan {
    pub(super) dir: PathBuf,
    pub(super) hostname: String,
    pub(super) also: Vec<String>,
    pub(super) listen: SocketAddr,
    pub(super) mqtt_listen: Option<SocketAddr>,
    /// Certificate and key that exist already.
    pub(super) given: Option<(PathBuf, PathBuf)>,
}

/// What the person is told, and what `quickstart` goes on with.
pub(super) struct Made {
    pub(super) config: PathBuf,
    pub(super) service: ConnectionString,
}

/// Runs the command.
pub(super) fn run(args: &InitArgs) -> Outcome {
    if args.renew {
        return renew(&args.dir);
    }
    let plan = plan(args)?;
    let made = init(&plan)?;
    tell(&plan, &made)
}

/// What to do next, with the only secret that somebody else than this machine needs.
fn tell(plan: &Plan, made: &Made) -> Outcome {
    let dir = plan.dir.display();
    let (config, owner, ca) = (made.config.display(), plan.dir.join(OWNER_FILE), plan.dir.join(CA_FILE));
    let authority = match plan.given {
        None => format!("Devices and services need the authority's certificate: {}\n", ca.display()),
        Some(_) => String::new(),
    };
    let secret = made.service.expose();
    let text = format!(
        "The hub's files are in {dir}. Start it with:\n\n    culvert hub --config {config}\n\n\
         Register devices on this machine with:\n\n    \
         culvert registry add DEVICE --connection-string-file {owner}\n\n{authority}\
         The service connection string, for service.toml's connection_string_file (keep it secret):\n\n{secret}",
        owner = owner.display(),
        secret = secret.expose_str().unwrap_or_default(),
    );
    say::once(text, || {
        format!(
            "the hub's files are in {dir}, but the service connection string could not be written; its key is there"
        )
    })
}

fn plan(args: &InitArgs) -> Outcome<Plan> {
    let hostname = args.hostname.clone().unwrap_or_default();
    let numeric = hostname.parse::<std::net::Ipv4Addr>().is_ok();
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-.".contains(c);
    // The last is what the hub itself says of the file that would be written.
    if !hostname.chars().all(allowed) || (!numeric && hostname.ends_with('.')) || !host_is_valid(&hostname) {
        let hint = match hostname.trim_start_matches('[').trim_end_matches(']').parse::<std::net::Ipv6Addr>() {
            Ok(_) => {
                "an IPv6 address has no place in tokens and user names, so give the hub a name (DNS or hosts file)"
            }
            Err(_) => "leave out scheme and port",
        };
        return Err(Failure::usage(anyhow::anyhow!("{hostname:?} is not a host name; {hint}")));
    }
    if let Some(name) = args.also.iter().find(|name| !may_be_certified(name)) {
        return Err(Failure::usage(anyhow::anyhow!("--also {name:?} is neither a host name nor an address")));
    }
    let mqtt_listen = match args.mqtt_listen.as_str() {
        "off" => None,
        address => Some(address.parse().with_context(|| format!("--mqtt-listen {address}")).map_err(Failure::usage)?),
    };
    let absolute = |path: &Path| std::path::absolute(path).map_err(Failure::usage);
    let given = args.certificate.as_deref().zip(args.private_key.as_deref());
    let given = given.map(|(certificate, key)| Ok((absolute(certificate)?, absolute(key)?))).transpose()?;
    if let Some((certificate, key)) = &given {
        let tls = ServerTls::load(certificate, key).map_err(Failure::config)?;
        if let Some(problem) = tls.complaint(&hostname) {
            say::aside(format_args!("{problem} (warning)"));
        }
    }
    Ok(Plan { dir: absolute(&args.dir)?, hostname, also: args.also.clone(), listen: args.listen, mqtt_listen, given })
}

/// A name, an address, or a name whose first label is any.
fn may_be_certified(name: &str) -> bool {
    let plain = name.strip_prefix("*.").unwrap_or(name);
    name.parse::<IpAddr>().is_ok() || (!plain.starts_with('[') && host_is_valid(plain))
}

/// Makes the hub's files. All or, if one of them exists, none.
pub(super) fn init(plan: &Plan) -> Outcome<Made> {
    let (mut files, mut strings) = (Vec::new(), Vec::new());
    let policies: String = policy::STANDARD_POLICIES
        .iter()
        .map(|(name, rights)| {
            let primary = random_key()?;
            files.push(NewFile::secret(format!("keys/{name}.primary"), key::encode_key(&primary)));
            files.push(NewFile::secret(format!("keys/{name}.secondary"), key::encode_key(&random_key()?)));
            strings.push(connection_string(plan, name, primary)?);
            Ok(policy_text(name, rights))
        })
        .collect::<anyhow::Result<_>>()
        .map_err(Failure::software)?;
    let mut named = |name: &str| {
        let index = strings.iter().position(|string| string.owner == Owner::Policy(policy_name(name)));
        index.map(|index| strings.swap_remove(index)).ok_or_else(|| Failure::software(anyhow::anyhow!("no {name}")))
    };
    let (owner, service) = (named("iothubowner")?, named("service")?);
    files.push(NewFile::private(OWNER_FILE, owner.expose().expose_str().unwrap_or_default()));
    let tls = match &plan.given {
        Some((certificate, key)) => (certificate.display().to_string(), key.display().to_string()),
        None => {
            let mut names = vec![plan.hostname.clone()];
            names.extend(plan.also.iter().cloned());
            files.extend(certificates(&names).map_err(Failure::software)?);
            ("hub.pem".into(), "hub.key".into())
        }
    };
    files.push(NewFile::public("hub.toml", config_text(plan, &tls, &policies)));
    write_all(&plan.dir, &files).map_err(Failure::unavailable)?;
    Ok(Made { config: plan.dir.join("hub.toml"), service })
}

/// Makes a new certificate for the names that the present one has.
fn renew(dir: &Path) -> Outcome {
    let read = |name: &str| fs::read_to_string(dir.join(name)).with_context(|| dir.join(name).display().to_string());
    let make = || {
        let authority = pki::Pair { certificate: read(CA_FILE)?, key: Secret::new(read("ca.key")?) };
        pki::server(&authority, &pki::names_of(&read("hub.pem")?)?)
    };
    let pair = make().map_err(Failure::config)?;
    // The hub keeps its old pair until both files fit each other.
    let key = NewFile::secret("hub.key", pair.key.expose_str().unwrap_or_default());
    let swapped = key.replace(dir).and_then(|()| NewFile::public("hub.pem", pair.certificate).replace(dir));
    swapped.map_err(Failure::unavailable)?;
    say::line(format_args!("{} is new; a running hub takes it up by itself", dir.join("hub.pem").display()))
}

fn certificates(names: &[String]) -> anyhow::Result<[NewFile; 4]> {
    let authority = pki::authority()?;
    let hub = pki::server(&authority, names)?;
    let text = |key: &Secret| key.expose_str().unwrap_or_default().to_owned();
    Ok([
        NewFile::public(CA_FILE, authority.certificate),
        NewFile::private("ca.key", text(&authority.key)),
        NewFile::public("hub.pem", hub.certificate),
        NewFile::secret("hub.key", text(&hub.key)),
    ])
}

fn random_key() -> anyhow::Result<Secret> {
    let mut bytes = [0; KEY_BYTES];
    getrandom::fill(&mut bytes)?;
    Ok(Secret::new(bytes))
}

fn connection_string(plan: &Plan, policy: &str, key: Secret) -> anyhow::Result<ConnectionString> {
    Ok(ConnectionString {
        host: plan.hostname.clone(),
        port: plan.listen.port(),
        gateway: None,
        owner: Owner::Policy(policy.parse()?),
        credential: Credential::Key(key),
    })
}

/// The standard policies' names are names.
fn policy_name(name: &str) -> Name {
    name.parse().unwrap_or_else(|_| unreachable!("{name} is one of STANDARD_POLICIES, each of which parses"))
}

fn policy_text(name: &str, rights: &[policy::Rights]) -> String {
    let rights: Vec<String> = rights.iter().map(|right| format!("\"{right}\"")).collect();
    format!(
        "\n[[policy]]\nname = \"{name}\"\nrights = [{}]\nprimary_key_file = \"keys/{name}.primary\"\n\
         secondary_key_file = \"keys/{name}.secondary\"\n",
        rights.join(", ")
    )
}

fn config_text(plan: &Plan, (certificate, key): &(String, String), policies: &str) -> String {
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let mqtt = plan.mqtt_listen.map(|address| format!("\"{address}\"")).unwrap_or_default();
    let places = if plan.dir == Path::new(SYSTEM_DIR) {
        String::new()
    } else {
        let inside = |name: &str| quoted(&plan.dir.join(name).display().to_string());
        format!("state_dir = {}\ncontrol_socket = {}\n", inside("state"), inside("hub.sock"))
    };
    format!(
        "# Made by `culvert hub init`. All keys: config/hub.toml in the source.\n\
         # The hub takes up changes by itself; `culvert check` tells what a change would do.\n\n\
         # The name in tokens and certificates.\nhostname = {hostname}\n\
         # HTTPS: service API, registry, MQTT over WebSocket, streaming endpoint.\nlisten = [\"{listen}\"]\n\
         # MQTT over TLS; [] turns it off.\nmqtt_listen = [{mqtt}]\n{places}\n\
         [tls]\ncertificate_file = {certificate}\nprivate_key_file = {key}\n\
         {policies}",
        hostname = quoted(&plan.hostname),
        listen = plan.listen,
        certificate = quoted(certificate),
        key = quoted(key),
    )
}

/// A file to be made.
struct NewFile {
    name: String,
    contents: Secret,
    mode: u32,
    /// Readable by the daemons' group.
    grouped: bool,
}

impl NewFile {
    fn public(name: impl Into<String>, contents: impl Into<String>) -> Self {
        Self { name: name.into(), contents: Secret::new(contents.into()), mode: 0o644, grouped: false }
    }

    /// For the daemons and their administrator.
    fn secret(name: impl Into<String>, contents: impl Into<String>) -> Self {
        Self { name: name.into(), contents: Secret::new(contents.into()), mode: 0o600, grouped: true }
    }

    /// For the administrator alone.
    fn private(name: impl Into<String>, contents: impl Into<String>) -> Self {
        Self { name: name.into(), contents: Secret::new(contents.into()), mode: 0o600, grouped: false }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(self.mode).open(path)?;
        file.write_all(self.contents.expose())?;
        file.sync_all()?;
        if let Some(group) = daemons_group().filter(|_| self.grouped) {
            chown(path, None, Some(group))?;
            fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o640))?;
        }
        Ok(())
    }

    /// Swaps the file in at once: a reader sees the old one or the new one.
    fn replace(&self, dir: &Path) -> anyhow::Result<()> {
        let (path, fresh) = (dir.join(&self.name), dir.join(format!(".{}.new", self.name)));
        // What an interrupted run left.
        let _ = fs::remove_file(&fresh);
        self.write(&fresh).and_then(|()| fs::rename(&fresh, &path)).with_context(|| path.display().to_string())
    }
}

fn write_all(dir: &Path, files: &[NewFile]) -> anyhow::Result<()> {
    if let Some(exists) = files.iter().map(|file| dir.join(&file.name)).find(|path| path.exists()) {
        anyhow::bail!("{} exists; nothing was changed", exists.display());
    }
    let folder = |path: &Path, mode| {
        let made = fs::DirBuilder::new().recursive(true).mode(mode).create(path);
        made.with_context(|| path.display().to_string())
    };
    folder(dir, 0o755)?;
    folder(&dir.join("keys"), 0o755)?;
    for file in files {
        let path = dir.join(&file.name);
        file.write(&path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The daemons' group, if this user may give files to it.
fn daemons_group() -> Option<u32> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").ok().filter(|process| process.uid() == 0)?;
    let groups = fs::read_to_string("/etc/group").ok()?;
    let line = groups.lines().find(|line| line.split(':').next() == Some(GROUP))?;
    line.split(':').nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn plan_in(name: &str) -> Plan {
        let dir = std::env::temp_dir().join(format!("culvert-init-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Plan {
            dir,
            hostname: "hub.example.com".into(),
            also: vec!["127.0.0.1".into()],
            listen: "127.0.0.1:8443".parse().unwrap(),
            mqtt_listen: None,
            given: None,
        }
    }

    #[test]
    fn a_new_hub_has_five_policies_and_keeps_its_secrets() {
        let plan = plan_in("new");
        let made = init(&plan).unwrap();
        let service = made.service.expose();
        let text = service.expose_str().unwrap();
        assert!(text.starts_with("HostName=hub.example.com:8443;SharedAccessKeyName=service;SharedAccessKey="));
        let config: toml::Table = fs::read_to_string(&made.config).unwrap().parse().unwrap();
        assert_eq!(config["policy"].as_array().unwrap().len(), 5);
        for secret in ["ca.key", "owner.connection"] {
            let mode = fs::metadata(plan.dir.join(secret)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{secret}");
        }
        let mode = fs::metadata(plan.dir.join("keys/service.primary")).unwrap().permissions().mode();
        assert_eq!(mode & 0o007, 0, "others may not read keys");

        let before = fs::read(plan.dir.join("hub.pem")).unwrap();
        assert!(init(&plan).is_err(), "nothing is overwritten");
        assert_eq!(fs::read(plan.dir.join("hub.pem")).unwrap(), before);
        renew(&plan.dir).unwrap();
        let after = fs::read_to_string(plan.dir.join("hub.pem")).unwrap();
        assert_ne!(after.as_bytes(), before);
        assert_eq!(pki::names_of(&after).unwrap(), ["hub.example.com", "127.0.0.1"]);
        fs::remove_dir_all(&plan.dir).unwrap();
    }
}
