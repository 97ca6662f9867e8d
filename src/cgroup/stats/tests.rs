use super::*;

#[test]
fn sizes_of_pages_are_named_as_the_controller_does() {
    assert_eq!(page_size_name("hugepages-2048kB").unwrap(), "2MB");
    assert_eq!(page_size_name("hugepages-1048576kB").unwrap(), "1GB");
    assert_eq!(page_size_name("hugepages-64kB").unwrap(), "64KB");
    assert_eq!(page_size_name("other"), None);
}

#[test]
fn pressure_is_read() {
    let text =
        "some avg10=1.50 avg60=0.00 avg300=0.25 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n";
    let pressure = parse_pressure(text).unwrap();
    assert_eq!((pressure.some.avg10, pressure.some.total, pressure.full.total), (1.5, 77, 3));
    assert!(parse_pressure("some avg10").is_err());
}

#[test]
fn a_group_of_v1_is_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    file("cpuacct.usage", "1000\n");
    file("cpuacct.usage_percpu", "400 600 \n");
    file("cpuacct.usage_all", "cpu user system\n0 300 100\n1 500 100\n");
    file("cpuacct.stat", "user 3\nsystem 2\n");
    file("pids.current", "4\n");
    file("pids.max", "max\n");
    file("memory.stat", "cache 10\nrss 20\n");
    for kind in ["memory", "memory.memsw"] {
        for (field, value) in [("usage", 30), ("max_usage", 40), ("limit", 50)] {
            file(&format!("{kind}.{field}_in_bytes"), &format!("{value}\n"));
        }
        file(&format!("{kind}.failcnt"), "1\n");
    }
    file("blkio.throttle.io_serviced_recursive", "8:0 Read 1\n8:0 Total 1\nTotal 1\n");
    file("blkio.throttle.io_service_bytes_recursive", "8:0 Read 512\nTotal 512\n");
    let names = ["cpuacct", "pids", "memory", "blkio"];
    let paths = names.iter().map(|n| ((*n).to_owned(), dir.path().to_owned())).collect();
    let json = serde_json::to_value(read_all(&Cgroup::load(paths)).unwrap()).unwrap();
    assert_eq!(json["cpu"]["usage"]["total"], 1000);
    assert_eq!(json["cpu"]["usage"]["percpu_user"], serde_json::json!([300, 500]));
    assert_eq!(json["cpu"]["usage"]["user"], 30_000_000);
    assert_eq!(json["pids"], serde_json::json!({"current": 4}));
    assert_eq!(
        json["memory"]["usage"],
        serde_json::json!({"limit": 50, "usage": 30, "max": 40, "failcnt": 1})
    );
    assert_eq!(json["memory"]["raw"]["rss"], 20);
    assert_eq!(json["blkio"]["ioServiceBytesRecursive"][0]["value"], 512);
    assert_eq!(json["network_interfaces"], serde_json::Value::Null);
}

#[test]
fn a_group_of_v2_is_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    file(
        "cpu.stat",
        "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 1\nnr_throttled 1\nthrottled_usec 9\n",
    );
    file("memory.stat", "anon 1\nfile 2\n");
    file("memory.current", "100\n");
    file("memory.max", "max\n");
    file("memory.swap.current", "7\n");
    file("memory.swap.max", "20\n");
    file("io.stat", "8:0 rbytes=512 wbytes=0 rios=1 wios=0\n");
    file("cgroup.procs", "1\n2\n");
    let paths = BTreeMap::from([(String::new(), dir.path().to_owned())]);
    let json = serde_json::to_value(read_all(&Cgroup::load(paths)).unwrap()).unwrap();
    assert_eq!(json["cpu"]["usage"]["total"], 5000);
    assert_eq!(json["cpu"]["throttling"]["throttledTime"], 9000);
    assert_eq!(json["memory"]["usage"]["limit"], u64::MAX);
    assert_eq!(json["memory"]["swap"]["usage"], 107);
    assert_eq!(json["memory"]["cache"], 2);
    assert_eq!(json["pids"]["current"], 2);
    assert_eq!(json["blkio"]["ioServicedRecursive"][0]["op"], "Read");
}
