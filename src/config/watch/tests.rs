//! Every way in which people and programs change a file, on a real file system.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use tokio::time::timeout;

use super::*;
use crate::config::{
    Environment, Load, LoadError, Loaded, Outcome, Reload, Reloader, ServiceConfig,
    scratch::{CANARY, Scratch, service_files},
};

/// Nothing here takes longer on a machine that is merely slow.
const PATIENCE: Duration = Duration::from_secs(60);

fn rules(names: &[&str]) -> String {
    let rule = |(index, name): (usize, &&str)| {
        format!(
            "[[forward]]\nname = \"{name}\"\nlisten = \"127.0.0.1:{}\"\ndevice = \"d\"\ntarget = \"t\"\n",
            index + 1
        )
    };
    names.iter().enumerate().map(rule).collect()
}

fn main_file(names: &[&str]) -> String {
    format!("connection_string_file = \"service.connection\"\n{}", rules(names))
}

fn load(path: &Path) -> Result<Loaded<ServiceConfig>, LoadError> {
    ServiceConfig::load(path, &Environment::default())
}

fn reloader(path: PathBuf) -> Reloader<ServiceConfig> {
    let loaded = load(&path).unwrap();
    Reloader::start(path, Environment::default(), loaded)
}

async fn next(reloader: &mut Reloader<ServiceConfig>) -> Reload<ServiceConfig> {
    timeout(PATIENCE, reloader.next()).await.expect("the change was not noticed")
}

/// Waits until the configuration holds exactly these forwards; states in between may be invalid, but never valid and
/// something else.
async fn expect(reloader: &mut Reloader<ServiceConfig>, names: &[&str]) -> ServiceConfig {
    loop {
        match next(reloader).await.outcome {
            Outcome::Changed { config, .. } => {
                let found: Vec<&str> = config.forwards.iter().map(|rule| rule.name.as_str()).collect();
                assert_eq!(found, names);
                return *config;
            }
            Outcome::Unchanged | Outcome::Invalid(_) => {}
        }
    }
}

/// A folder with a service's files in it, and the reloader that watches it.
fn world() -> (Scratch, Reloader<ServiceConfig>) {
    let scratch = Scratch::new();
    service_files(&scratch);
    let path = scratch.write("service.toml", main_file(&["a"]));
    (scratch, reloader(path))
}

#[tokio::test]
async fn a_file_renamed_over_the_old_one_twice() {
    let (scratch, mut reloader) = world();
    for names in [["a", "b"], ["a", "c"]] {
        let new = scratch.write("service.toml.new", main_file(&names));
        fs::rename(new, scratch.path("service.toml")).unwrap();
        expect(&mut reloader, &names).await;
    }
}

#[tokio::test]
async fn what_was_not_applied_is_offered_again() {
    let (scratch, mut reloader) = world();
    scratch.write("service.toml", main_file(&["b"]));
    expect(&mut reloader, &["b"]).await;
    reloader.not_applied();
    reloader.poker().poke();
    let reload = next(&mut reloader).await;
    assert!(matches!(reload.outcome, Outcome::Changed { .. }), "{reload:?}");
    reloader.poker().poke();
    let reload = next(&mut reloader).await;
    assert!(matches!(reload.outcome, Outcome::Unchanged), "{reload:?}");
}

#[tokio::test]
async fn a_file_written_in_place() {
    let (scratch, mut reloader) = world();
    scratch.write("service.toml", main_file(&["b"]));
    expect(&mut reloader, &["b"]).await;
    let mut file = fs::OpenOptions::new().append(true).open(scratch.path("service.toml")).unwrap();
    write!(file, "[log]\nlevel = \"debug\"\n").unwrap();
    drop(file);
    assert_eq!(expect(&mut reloader, &["b"]).await.log.level, "debug");
}

/// Vim with `backup`: the old file is renamed away, a new one is written, the backup is removed. It also probes the
/// folder with a file named 4913 and keeps a swap file.
#[tokio::test]
async fn vims_way_of_saving() {
    let (scratch, mut reloader) = world();
    scratch.write(".service.toml.swp", "swap");
    scratch.write("4913", "");
    fs::remove_file(scratch.path("4913")).unwrap();
    fs::rename(scratch.path("service.toml"), scratch.path("service.toml~")).unwrap();
    scratch.write("service.toml", main_file(&["vim"]));
    fs::remove_file(scratch.path("service.toml~")).unwrap();
    expect(&mut reloader, &["vim"]).await;
}

/// A ConfigMap: the file is a link to `..data/service.toml`, `..data` a link to a folder with a date; an update makes a
/// new folder, swaps `..data` by rename and removes the old folder.
#[tokio::test]
async fn kubernetes_swaps_a_link() {
    let scratch = Scratch::new();
    let publish = |version: &str, names: &[&str]| {
        scratch.write(&format!("{version}/service.toml"), main_file(names));
        scratch.write(&format!("{version}/extra.toml"), rules(&["x"]).replace(":1", ":9"));
        symlink(version, scratch.path("..data_tmp")).unwrap();
        fs::rename(scratch.path("..data_tmp"), scratch.path("..data")).unwrap();
    };
    publish("..2024_01", &["a"]);
    service_files(&scratch);
    symlink("..data/service.toml", scratch.path("service.toml")).unwrap();
    let mut reloader = reloader(scratch.path("service.toml"));
    publish("..2024_02", &["a", "b"]);
    fs::remove_dir_all(scratch.path("..2024_01")).unwrap();
    expect(&mut reloader, &["a", "b"]).await;
    publish("..2024_03", &["c"]);
    fs::remove_dir_all(scratch.path("..2024_02")).unwrap();
    expect(&mut reloader, &["c"]).await;
}

/// The same for a folder of rules: the mounted folder stays, every file in it is a link, and keys come and go.
#[tokio::test]
async fn kubernetes_mounts_a_folder_of_rules() {
    let (scratch, _) = world();
    let publish = |version: &str, names: &[&str]| {
        for (index, name) in names.iter().enumerate() {
            let rule = rules(&[name]).replace(":1", &format!(":{}", index + 10));
            scratch.write(&format!("forwards.d/{version}/{name}.toml"), rule);
            let link = scratch.path(format!("forwards.d/{name}.toml"));
            if !link.is_symlink() {
                symlink(format!("..data/{name}.toml"), link).unwrap();
            }
        }
        symlink(version, scratch.path("forwards.d/..data_tmp")).unwrap();
        fs::rename(scratch.path("forwards.d/..data_tmp"), scratch.path("forwards.d/..data")).unwrap();
    };
    publish("..1", &["x"]);
    let mut reloader = reloader(scratch.path("service.toml"));
    publish("..2", &["x", "y"]);
    expect(&mut reloader, &["a", "x", "y"]).await;
    publish("..3", &["x"]);
    fs::remove_file(scratch.path("forwards.d/y.toml")).unwrap();
    expect(&mut reloader, &["a", "x"]).await;
}

#[tokio::test]
async fn a_folder_removed_and_made_again() {
    let scratch = Scratch::new();
    let fill = |names: &[&str]| {
        let text = format!("HostName=h;SharedAccessKeyName=p;SharedAccessKey={CANARY}");
        scratch.write("etc/culvert/service.connection", text);
        scratch.write("etc/culvert/service.toml", main_file(names));
    };
    fill(&["a"]);
    let mut reloader = reloader(scratch.path("etc/culvert/service.toml"));
    for names in [["a", "b"], ["a", "c"]] {
        fs::remove_dir_all(scratch.path("etc/culvert")).unwrap();
        assert!(matches!(next(&mut reloader).await.outcome, Outcome::Invalid(_)));
        fill(&names);
        expect(&mut reloader, &names).await;
    }
}

#[tokio::test]
async fn a_folder_replaced_by_another() {
    let scratch = Scratch::new();
    for (folder, name) in [("etc", "a"), ("new", "b")] {
        let text = format!("HostName=h;SharedAccessKeyName=p;SharedAccessKey={CANARY}");
        scratch.write(&format!("{folder}/service.connection"), text);
        scratch.write(&format!("{folder}/service.toml"), main_file(&[name]));
    }
    let mut reloader = reloader(scratch.path("etc/service.toml"));
    fs::rename(scratch.path("etc"), scratch.path("old")).unwrap();
    fs::rename(scratch.path("new"), scratch.path("etc")).unwrap();
    expect(&mut reloader, &["b"]).await;
    scratch.write("etc/service.toml", main_file(&["c"]));
    expect(&mut reloader, &["c"]).await;
}

#[tokio::test]
async fn rules_come_and_go_in_a_folder_that_was_not_there_at_first() {
    let (scratch, mut reloader) = world();
    let extra = |name: &str, port: &str| rules(&[name]).replace(":1", port);
    scratch.write("forwards.d/x.toml", extra("x", ":8"));
    expect(&mut reloader, &["a", "x"]).await;
    scratch.write("forwards.d/y.toml", extra("y", ":9"));
    expect(&mut reloader, &["a", "x", "y"]).await;
    scratch.write("forwards.d/x.toml", extra("z", ":8"));
    expect(&mut reloader, &["a", "z", "y"]).await;
    fs::remove_file(scratch.path("forwards.d/y.toml")).unwrap();
    expect(&mut reloader, &["a", "z"]).await;
    fs::remove_dir_all(scratch.path("forwards.d")).unwrap();
    expect(&mut reloader, &["a"]).await;
}

#[tokio::test]
async fn an_emptied_rule_file_is_a_mistake_not_the_end_of_its_rules() {
    let (scratch, mut reloader) = world();
    scratch.write("forwards.d/x.toml", rules(&["x"]).replace(":1", ":8"));
    expect(&mut reloader, &["a", "x"]).await;
    scratch.write("forwards.d/x.toml", "");
    let Outcome::Invalid(error) = next(&mut reloader).await.outcome else { panic!("an empty file was accepted") };
    assert!(error.to_string().contains("x.toml: is empty"), "{error}");
    scratch.write("forwards.d/x.toml", rules(&["y"]).replace(":1", ":8"));
    expect(&mut reloader, &["a", "y"]).await;
}

#[tokio::test]
async fn a_renewed_secret_is_a_change() {
    let (scratch, mut reloader) = world();
    let text = format!("HostName=other.example.com;SharedAccessKeyName=p;SharedAccessKey={CANARY}");
    let new = scratch.write("service.connection.new", text);
    fs::rename(new, scratch.path("service.connection")).unwrap();
    assert_eq!(expect(&mut reloader, &["a"]).await.connection_string.host, "other.example.com");
}

#[tokio::test]
async fn an_invalid_file_changes_nothing_and_its_repair_is_noticed() {
    let (scratch, mut reloader) = world();
    scratch.write("service.toml", "connection_string_file = [");
    assert!(matches!(next(&mut reloader).await.outcome, Outcome::Invalid(_)));
    scratch.write("service.toml", format!("# the same again\n{}", main_file(&["a"])));
    let repaired = next(&mut reloader).await;
    assert!(matches!(repaired.outcome, Outcome::Unchanged));
    assert_eq!(repaired.trigger, Trigger::Files);
}

#[tokio::test]
async fn a_poke_loads_again_whether_or_not_anything_changed() {
    let (_scratch, mut reloader) = world();
    let poker = reloader.poker();
    poker.poke();
    let reload = next(&mut reloader).await;
    assert_eq!(reload.trigger, Trigger::Poke);
    assert!(matches!(reload.outcome, Outcome::Unchanged));
}

#[tokio::test]
async fn a_change_between_loading_and_watching_is_noticed() {
    let scratch = Scratch::new();
    service_files(&scratch);
    let path = scratch.write("service.toml", main_file(&["a"]));
    let loaded = load(&path).unwrap();
    scratch.write("service.toml", main_file(&["b"]));
    let mut reloader = Reloader::start(path, Environment::default(), loaded);
    expect(&mut reloader, &["b"]).await;
}

#[tokio::test]
async fn who_asks_and_walks_away_again_and_again_learns_of_a_change_all_the_same() {
    let (scratch, mut reloader) = world();
    scratch.write("service.toml", main_file(&["b"]));
    let impatient = async {
        loop {
            if let Ok(reload) = timeout(Duration::from_millis(5), reloader.next()).await {
                return reload;
            }
        }
    };
    let reload = timeout(PATIENCE, impatient).await.unwrap();
    assert!(matches!(reload.outcome, Outcome::Changed { .. }));
}

/// The first half of a file may be valid by itself. While it is open for writing nobody looks at it.
#[tokio::test]
async fn a_writer_is_given_time_to_finish() {
    let (scratch, _) = world();
    let path = scratch.path("service.toml");
    let mut watcher = Watcher::start(load(&path).unwrap().files);
    settle(&mut watcher).await;
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(main_file(&["half"]).as_bytes()).unwrap();
    while watcher.unrest.is_none() || !watcher.inbox.is_being_written() {
        let action = watcher.next().await;
        assert!(matches!(action, Action::Stirred));
        assert!(watcher.apply(action).is_none());
    }
    assert_eq!(watcher.due(), watcher.unrest.unwrap().first + MAX_WRITING);
    file.write_all(rules(&["half", "whole"]).strip_prefix(&rules(&["half"])).unwrap().as_bytes()).unwrap();
    drop(file);
    assert_eq!(timeout(PATIENCE, watcher.changed()).await.unwrap(), Trigger::Files);
    assert_eq!(load(&path).unwrap().config.forwards.len(), 2);
}

/// Without inotify a change is found by the poll.
#[tokio::test(start_paused = true)]
async fn without_events_the_poll_finds_a_change() {
    let (scratch, _) = world();
    let path = scratch.path("service.toml");
    let mut watcher = Watcher::start(load(&path).unwrap().files);
    watcher.folders = Some(Folders::without_events(watcher.inbox.clone()));
    settle(&mut watcher).await;
    scratch.write("service.toml", main_file(&["b"]));
    let before = Instant::now();
    assert_eq!(watcher.changed().await, Trigger::Files);
    assert!(before.elapsed() <= POLL + QUIET);
}

/// Lets the first look, which sets the watches, happen.
async fn settle(watcher: &mut Watcher) {
    while watcher.unrest.is_some() || watcher.look.is_some() {
        let action = watcher.next().await;
        assert!(watcher.apply(action).is_none());
    }
}
