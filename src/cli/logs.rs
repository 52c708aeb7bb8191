//! `culvert logs`: the hub's DeviceStreams records as a table.
//!
//! Owns the choice of files and the columns. Does not know who writes the records.
//! Invariant: whatever a record holds, it is one line and cannot drive a terminal.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader},
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::Context as _;
use serde_json::Value;

use super::{
    args::{LogsArgs, Role},
    exit::{Failure, Outcome},
    places,
};
use crate::{
    base::Utc,
    config::{HubConfig, Load as _, ResourceLogConfig},
};

/// Runs the command.
pub(super) fn run(args: &LogsArgs) -> Outcome {
    let file = file(args)?;
    let filter = Filter {
        device: args.device.as_ref().map(|device| device.as_str().to_owned()),
        since: args.since.map(|span| SystemTime::now().checked_sub(span.0).unwrap_or(SystemTime::UNIX_EPOCH)),
    };
    let mut files: Vec<PathBuf> = (1..=ResourceLogConfig::MAX_KEEP)
        .map(|number| rotated(&file, number))
        .take_while(|older| older.exists())
        .collect();
    files.reverse();
    files.push(file);
    match print(&files, &filter, args.json, &mut io::stdout().lock()) {
        // The reader has seen enough: `culvert logs | head`.
        Err(error) if error.root_cause().downcast_ref::<io::Error>().is_some_and(is_closed_pipe) => Ok(()),
        done => done.map_err(Failure::unavailable),
    }
}

fn is_closed_pipe(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

/// The file that was named, the one in the configuration, or the default one.
fn file(args: &LogsArgs) -> Outcome<PathBuf> {
    if let Some(file) = &args.file {
        return Ok(file.clone());
    }
    let config = places::config_file(args.config.as_deref(), Role::Hub);
    let environment = places::environment(&config);
    match HubConfig::load(&config, &environment) {
        Ok(loaded) => Ok(loaded.config.resource_log.file),
        Err(problems) if args.config.is_some() => Err(Failure::config(problems)),
        // The configuration may be unreadable for people who may read the log.
        Err(_) => Ok(ResourceLogConfig::in_folder(&environment.state_dir(Role::Hub.name())).file),
    }
}

fn rotated(file: &Path, number: u32) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

struct Filter {
    device: Option<String>,
    since: Option<SystemTime>,
}

impl Filter {
    /// Times are compared as text, which ISO 8601 in UTC permits.
    fn takes(&self, record: &Value, properties: &Value) -> bool {
        let since = self.since.map(|since| Utc::from(since).to_string());
        let device = properties["deviceId"].as_str();
        since.is_none_or(|since| record["time"].as_str().unwrap_or_default() >= since.as_str())
            && self.device.as_deref().is_none_or(|wanted| device == Some(wanted))
    }
}

fn print(files: &[PathBuf], filter: &Filter, json: bool, out: &mut impl io::Write) -> anyhow::Result<()> {
    if !json {
        writeln!(out, "{}", columns(["TIME", "DEVICE", "STREAM", "RESULT", "MS", "DETAIL"]))?;
    }
    for path in files {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        for line in BufReader::new(file).lines() {
            let line = line.with_context(|| path.display().to_string())?;
            // The last line of a file that is being written may be half a record.
            let Ok(parsed) = serde_json::from_str::<Value>(&line) else { continue };
            for record in parsed["records"].as_array().map_or(std::slice::from_ref(&parsed), Vec::as_slice) {
                print_record(record, filter, json, out)?;
            }
        }
    }
    out.flush().map_err(Into::into)
}

fn print_record(record: &Value, filter: &Filter, json: bool, out: &mut impl io::Write) -> io::Result<()> {
    let properties: Value =
        record["properties"].as_str().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    if !filter.takes(record, &properties) {
        return Ok(());
    }
    if json {
        return writeln!(out, "{record}");
    }
    writeln!(out, "{}", row(record, &properties))
}

fn row(record: &Value, properties: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.escape_debug().to_string(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let device = match &properties["moduleId"] {
        Value::String(module) if !module.is_empty() => format!("{}/{module}", text(&properties["deviceId"])),
        _ => text(&properties["deviceId"]),
    };
    // The cloud's `resultType` is empty for a rejection too; `result` and `reason` are keys of ours that tell.
    let first = |values: [&Value; 2], otherwise: &str| {
        let mut texts = values.iter().map(|value| text(value)).filter(|text| !text.is_empty());
        texts.next().unwrap_or_else(|| otherwise.to_owned())
    };
    let result = first([&properties["result"], &record["resultType"]], "ok");
    columns([
        &text(&record["time"]),
        &device,
        &text(&properties["requestName"]),
        &result,
        &text(&record["durationMs"]),
        &first([&properties["reason"], &record["resultDescription"]], ""),
    ])
}

fn columns([time, device, stream, result, ms, detail]: [&str; 6]) -> String {
    format!("{time:24}  {device:20}  {stream:16}  {result:14}  {ms:>6}  {detail}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(time: &str, device: &str, detail: &str) -> String {
        let properties = serde_json::json!({ "deviceId": device, "moduleId": null, "requestName": "ssh" }).to_string();
        let record = serde_json::json!({
            "time": time, "resultType": "", "resultDescription": detail, "durationMs": "12", "properties": properties,
        });
        format!("{record}\n")
    }

    #[test]
    fn older_files_come_first_and_filters_apply() {
        let file = std::env::temp_dir().join(format!("culvert-logs-{}.log", std::process::id()));
        std::fs::write(rotated(&file, 1), record("2026-11-22T00:00:00.000Z", "pump-17", "old")).unwrap();
        let mut text = record("2026-11-23T00:00:00.000Z", "pump-17", "esc \u{1b}[2J\nend");
        text.push_str(&record("2026-11-23T00:00:01.000Z", "kiosk-1", "other"));
        text.push_str("{\"half");
        std::fs::write(&file, text).unwrap();

        let files = [rotated(&file, 1), file.clone()];
        let show = |filter: Filter, json| {
            let mut out = Vec::new();
            print(&files, &filter, json, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let table = show(Filter { device: Some("pump-17".into()), since: None }, false);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3, "{table}");
        assert!(lines[1].ends_with("old") && lines[2].contains(r"esc \u{1b}[2J\nend"), "{table}");
        let midnight = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_795_392_000);
        let recent = show(Filter { device: None, since: Some(midnight) }, true);
        assert_eq!(recent.lines().count(), 2, "{recent}");
        files.iter().for_each(|file| std::fs::remove_file(file).unwrap());
    }
}
