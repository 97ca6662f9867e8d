//! On a directory that looks like the file system, as far as plain files can: nothing there enforces anything.

use super::*;
use serde_json::json;

/// What a processor with everything has.
fn machine() -> (tempfile::TempDir, Resctrl) {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    file("schemata", "    MB:0=100;1=100\n    L3:0=7ff;1=7ff\n");
    file("info/last_cmd_status", "ok\n");
    for (name, text) in [("cbm_mask", "7ff\n"), ("min_cbm_bits", "1\n"), ("num_closids", "16\n")] {
        file(&format!("info/L3/{name}"), text);
    }
    for (name, text) in [
        ("bandwidth_gran", "10\n"),
        ("delay_linear", "1\n"),
        ("min_bandwidth", "10\n"),
        ("num_closids", "8\n"),
    ] {
        file(&format!("info/MB/{name}"), text);
    }
    file("info/L3_MON/mon_features", "llc_occupancy\nmbm_total_bytes\nmbm_local_bytes\n");
    let tree = Resctrl { root: dir.path().to_owned() };
    (dir, tree)
}

fn wanted(value: serde_json::Value) -> LinuxIntelRdt {
    serde_json::from_value(value).unwrap()
}

fn enter(tree: &Resctrl, value: serde_json::Value) -> Result<Place> {
    let mut place = Place::default();
    tree.enter(&wanted(value), "box", 42, &mut place).map(|()| place)
}

/// What rmdir(2) does to a class: its files are no obstacle.
fn empty(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() {
            fs::remove_dir_all(entry.path()).unwrap();
        } else {
            fs::remove_file(entry.path()).unwrap();
        }
    }
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_class_of_its_own_comes_and_goes_with_the_container() {
    let (dir, tree) = machine();
    let config =
        json!({ "l3CacheSchema": "L3:0=7f0;1=1f", "memBwSchema": "MB:0=20;1=70", "schemata": ["L2:0=3"] });
    let place = enter(&tree, config.clone()).unwrap();
    let class = dir.path().join("box");
    assert_eq!(place, Place { class: Some(class.clone()), monitor: None, made: true });
    tree.set(&wanted(config), &place).unwrap();
    assert_eq!(read(class.join("tasks")), "42");
    assert_eq!(read(class.join("schemata")), "L3:0=7f0;1=1f\nMB:0=20;1=70\nL2:0=3\n");
    place.join(43).unwrap();
    assert_eq!(read(class.join("tasks")), "43");
    empty(&class);
    place.leave().unwrap();
    assert!(!class.exists());
    place.leave().unwrap();
    place.join(44).unwrap();
}

#[test]
fn a_class_that_is_named_stays() {
    let (dir, tree) = machine();
    let config = json!({ "closID": "shared", "enableMonitoring": true });
    let refused = enter(&tree, config.clone()).unwrap_err().to_string();
    assert!(refused.contains("clos dir not accessible (must be pre-created when"), "{refused}");
    assert!(!dir.path().join("shared").exists());
    let class = dir.path().join("shared");
    fs::create_dir_all(class.join("mon_groups")).unwrap();
    let place = enter(&tree, config).unwrap();
    let monitor = class.join("mon_groups/box");
    assert_eq!(place, Place { class: Some(class.clone()), monitor: Some(monitor.clone()), made: false });
    assert_eq!((read(class.join("tasks")), read(monitor.join("tasks"))), ("42".into(), "42".into()));
    empty(&monitor);
    place.leave().unwrap();
    assert!(class.exists() && !monitor.exists());
    // With a schema it is made where it is missing, and still not ours to remove.
    let place = enter(&tree, json!({ "closID": "new", "schemata": ["MB:0=10"] })).unwrap();
    assert!(!place.made && dir.path().join("new").exists());
    assert_eq!(
        enter(&tree, json!({ "closID": "/" })).unwrap().class.as_deref(),
        Some(dir.path().join("").as_path())
    );
}

#[test]
fn failures_carry_the_kernels_own_words() {
    let (dir, tree) = machine();
    fs::write(dir.path().join("info/last_cmd_status"), "unknown resource\n").unwrap();
    fs::create_dir_all(dir.path().join("box/tasks")).unwrap();
    let said = enter(&tree, json!({})).unwrap_err().to_string();
    assert!(said.contains("intelrdt: unable to add pid 42"), "{said}");
    assert!(said.ends_with("last_cmd_status: unknown resource"), "{said}");
}

#[test]
fn what_the_machine_lacks_is_refused() {
    let (dir, tree) = machine();
    let said = |value, tree: Option<&Resctrl>| validate(&wanted(value), tree).unwrap_err().to_string();
    assert_eq!(said(json!({}), None), "intelRdt is specified in config, but Intel RDT is not enabled");
    for name in [".", "..", "a/b", "/a"] {
        assert_eq!(said(json!({ "closID": name }), Some(&tree)), format!("invalid intelRdt.ClosID {name:?}"));
    }
    let both = json!({ "l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=20" });
    validate(&wanted(both.clone()), Some(&tree)).unwrap();
    fs::remove_dir_all(dir.path().join("info/MB")).unwrap();
    assert!(
        said(both.clone(), Some(&tree))
            .contains("intelRdt.memBwSchema is specified in config, but Intel RDT/MBA")
    );
    fs::remove_dir_all(dir.path().join("info/L3")).unwrap();
    assert!(
        said(both, Some(&tree)).contains("intelRdt.l3CacheSchema is specified in config, but Intel RDT/CAT")
    );
    validate(&wanted(json!({ "schemata": ["L2:0=3"] })), Some(&tree)).unwrap();
}

#[test]
fn statistics_have_runcs_names() {
    let (dir, tree) = machine();
    let config = json!({ "schemata": ["    MB:0=20;1=70", "L3:0=7f0;1=1f"] });
    let place = enter(&tree, config.clone()).unwrap();
    tree.set(&wanted(config), &place).unwrap();
    for (cache, total) in [("mon_L3_00", "100\n"), ("mon_L3_01", "200\n")] {
        let data = dir.path().join("box/mon_data").join(cache);
        fs::create_dir_all(&data).unwrap();
        for (file, text) in
            [("mbm_total_bytes", total), ("mbm_local_bytes", "50\n"), ("llc_occupancy", "7\n")]
        {
            fs::write(data.join(file), text).unwrap();
        }
    }
    let stats = serde_json::to_value(tree.stats(&place).unwrap()).unwrap();
    assert_eq!(
        stats,
        json!({
            "l3_cache_info": { "cbm_mask": "7ff", "min_cbm_bits": 1, "num_closids": 16 },
            "l3_cache_schema_root": "L3:0=7ff;1=7ff",
            "l3_cache_schema": "L3:0=7f0;1=1f",
            "mem_bw_info": { "bandwidth_gran": 10, "delay_linear": 1, "min_bandwidth": 10, "num_closids": 8 },
            "mem_bw_schema_root": "MB:0=100;1=100",
            "mem_bw_schema": "MB:0=20;1=70",
            "schemata": ["MB:0=20;1=70", "L3:0=7f0;1=1f"],
            "mbm_stats": [
                { "mbm_total_bytes": 100, "mbm_local_bytes": 50 },
                { "mbm_total_bytes": 200, "mbm_local_bytes": 50 },
            ],
            "cmt_stats": [{ "llc_occupancy": 7 }, { "llc_occupancy": 7 }],
        })
    );
    let none = serde_json::to_value(tree.stats(&Place::default()).unwrap()).unwrap();
    assert_eq!(none, json!({}));
    fs::write(dir.path().join("info/L3_MON/mon_features"), "").unwrap();
    let stats = serde_json::to_value(tree.stats(&place).unwrap()).unwrap();
    assert_eq!((stats.get("mbm_stats"), stats.get("cmt_stats")), (None, None));
}

#[test]
fn state_has_runcs_names() {
    let place =
        Place { class: Some("/r/box".into()), monitor: Some("/r/box/mon_groups/box".into()), made: true };
    let value = serde_json::to_value(&place).unwrap();
    let expected = json!({
        "intel_rdt_path": "/r/box",
        "intel_rdt_mon_path": "/r/box/mon_groups/box",
        "intel_rdt_made": true,
    });
    assert_eq!(value, expected);
    assert_eq!(serde_json::from_value::<Place>(value).unwrap(), place);
    assert_eq!(serde_json::to_value(Place::default()).unwrap(), json!({}));
}
