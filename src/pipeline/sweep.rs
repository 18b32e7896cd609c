//! Sweeps: one recipe file, many recipes. `sweep` is a list of axes, each a list of tables; a variant takes one table of
//! every axis and merges it into the file. A table for a list of tables (`kd.train.lr`) is for each of them.

use toml::{Table, Value};

use crate::{Error, Result};

const SWEEP: &str = "sweep";
/// Variants of a file: axes multiply, and a few lines too many would fill the memory.
const MOST: usize = 10_000;
/// Key of a point: what it is called.
const NAME: &str = "name";

/// All variants with their labels; a file without a sweep has one, without a label. `settings` (`KEY=VALUE`) have the last
/// word.
///
/// # Errors
/// A file that is not TOML, a setting without a value, or a sweep that is not a list of lists of tables.
pub(super) fn tables(text: &str, settings: &[String]) -> Result<Vec<(String, Table)>> {
    let mut file: Table = toml::from_str(text).map_err(Error::invalid)?;
    let settings = settings.iter().map(|text| setting(text));
    let settings = settings.collect::<Result<Vec<_>>>()?;
    for table in &settings {
        merge(&mut file, table.clone());
    }
    let axes = match file.remove(SWEEP) {
        Some(sweep) => axes(sweep)?,
        None => Vec::new(),
    };
    let count = axes
        .iter()
        .try_fold(1usize, |n, axis| n.checked_mul(axis.len()));
    if count.is_none_or(|count| count > MOST) {
        return Err(Error::invalid(format!(
            "sweep: {} axes are more than {MOST} variants: divide it into several files",
            axes.len()
        )));
    }
    let mut all = vec![(String::new(), file)];
    for axis in axes {
        let step = |(label, table): &(String, Table)| {
            let points = axis.iter().map(|point| {
                let (mut table, mut point) = (table.clone(), point.clone());
                let name = match point.remove(NAME) {
                    Some(Value::String(name)) => name,
                    _ => describe(&point, ""),
                };
                merge(&mut table, point);
                let label = match label.as_str() {
                    "" => name,
                    label => format!("{label}, {name}"),
                };
                (label, table)
            });
            points.collect::<Vec<_>>()
        };
        all = all.iter().flat_map(step).collect();
    }
    for (_, table) in &mut all {
        for setting in &settings {
            merge(table, setting.clone());
        }
        table.remove(SWEEP);
    }
    Ok(all)
}

fn axes(sweep: Value) -> Result<Vec<Vec<Table>>> {
    let list = |value: Value| match value {
        Value::Array(list) => Some(list),
        _ => None,
    };
    let table = |value: Value| match value {
        Value::Table(table) => Some(table),
        _ => None,
    };
    let axis = |axis: Value| {
        let points = list(axis)?.into_iter().map(table);
        points.collect::<Option<Vec<_>>>().filter(|p| !p.is_empty())
    };
    let axes = list(sweep).and_then(|axes| axes.into_iter().map(axis).collect());
    axes.ok_or_else(|| Error::invalid("sweep: give a list of axes, each a list of tables"))
}

/// `KEY=VALUE` as a table; what is no TOML value is a string.
fn setting(text: &str) -> Result<Table> {
    let Some((key, value)) = text.split_once('=') else {
        return Err(Error::invalid(format!("setting {text:?}: give KEY=VALUE")));
    };
    let parse = |value: &str| toml::from_str::<Table>(&format!("{key} = {value}"));
    let quoted = Value::String(value.to_owned()).to_string();
    parse(value)
        .or_else(|_| parse(&quoted))
        .map_err(|e| Error::invalid(format!("setting {text:?}: {e}")))
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(into)), Value::Table(from)) => merge(into, from),
            (Some(Value::Array(list)), Value::Table(from))
                if !list.is_empty() && list.iter().all(Value::is_table) =>
            {
                for into in list.iter_mut().filter_map(Value::as_table_mut) {
                    merge(into, from.clone());
                }
            }
            (_, value) => _ = into.insert(key, value),
        }
    }
}

fn describe(table: &Table, at: &str) -> String {
    let each = table.iter().map(|(key, value)| match value {
        Value::Table(inner) => describe(inner, &format!("{at}{key}.")),
        Value::String(text) => format!("{at}{key}={text}"),
        value => format!("{at}{key}={value}"),
    });
    each.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
        seed = 0
        sweep = [
            [{ name = "small", plan.rank = 8 }, { plan.rank = 16 }],
            [{ seed = 1 }, { seed = 2, kd.train.lr = 0.5 }],
        ]
        [plan]
        rope = 4
        [[kd]]
        train = { lr = 1.0, steps = 3 }
        [[kd]]
    "#;

    #[test]
    fn every_combination_is_a_variant() {
        let all = tables(FILE, &[]).unwrap();
        let labels: Vec<&str> = all.iter().map(|(label, _)| label.as_str()).collect();
        assert_eq!(
            labels,
            [
                "small, seed=1",
                "small, kd.train.lr=0.5 seed=2",
                "plan.rank=16, seed=1",
                "plan.rank=16, kd.train.lr=0.5 seed=2"
            ]
        );
        let wanted = "seed = 2\n[plan]\nrank = 16\nrope = 4\n[[kd]]\ntrain = { lr = 0.5, steps = 3 }\n[[kd]]\ntrain = { lr = 0.5 }";
        assert_eq!(all[3].1, toml::from_str(wanted).unwrap());
    }

    #[test]
    fn settings_have_the_last_word() {
        let settings = ["seed=7", "plan.name=budget:5%", "sweep=[]"].map(String::from);
        let all = tables(FILE, &settings).unwrap();
        assert_eq!((all.len(), all[0].0.as_str()), (1, ""));
        let table = &all[0].1;
        assert_eq!(table["seed"], Value::Integer(7));
        assert_eq!(table["plan"]["name"], Value::String("budget:5%".into()));
        let all = tables(FILE, &settings[..1]).unwrap();
        assert!(all.iter().all(|(_, t)| t["seed"] == Value::Integer(7)));
    }

    #[test]
    fn mistakes_are_named() {
        let say = |text: &str, setting: &[&str]| {
            let settings: Vec<String> = setting.iter().map(|s| s.to_string()).collect();
            tables(text, &settings).unwrap_err().to_string()
        };
        assert!(say("sweep = 1", &[]).contains("a list of axes"));
        assert!(say("sweep = [[]]", &[]).contains("a list of axes"));
        let axes = "[{ seed = 1 }, { seed = 2 }],".repeat(64);
        assert!(say(&format!("sweep = [{axes}]"), &[]).contains("64 axes are more than"));
        assert!(say("", &["seed"]).contains("give KEY=VALUE"));
        assert!(say("", &["a b=1"]).contains("setting \"a b=1\""));
    }
}
