//! Extensions of stasis.img. `task`: what threads have that CRIU's core image has no field for. Ancillary: a restore
//! without it runs right, a little less as it was. `io_uring`: what CRIU cannot restore at all.

use crate::checkpoint::image::record::records;

records! {
    /// The extension's bytes.
    TaskExtra = "task_extra" {
        threads: repeated message(ThreadExtra) = 1,
        bottom_filter_is_runtimes: optional bool = 2,
        unseen_stops: repeated uint32 = 3,
        ends: repeated message(ChildEnd) = 4,
    }

    /// What a process's parent is told of its end with, where that is not SIGCHLD; 0 for nothing.
    ChildEnd = "child_end" {
        pid: required uint32 = 1,
        signal: required uint32 = 2,
    }

    /// One thread, by its id inside the container.
    ThreadExtra = "thread_extra" {
        tid: required uint32 = 1,
        xstate: repeated message(XstateComponent) = 2,
        affinity: optional bytes = 3,
        timer_slack: optional uint64 = 4,
        io_priority: optional uint32 = 5,
        features: optional uint64 = 7,
        modes: repeated message(ThreadMode) = 8,
        core_filter: optional uint32 = 9,
        memory_policy: optional uint32 = 10,
        memory_nodes: optional bytes = 11,
        dispatch: optional message(ThreadDispatch) = 12,
        placement: repeated message(MappingPolicy) = 13,
        io_flusher: optional bool = 14,
        least_use: optional uint32 = 15,
        most_use: optional uint32 = 16,
        cookie: optional uint32 = 17,
        labels: repeated message(ThreadLabel) = 18,
        deadline: optional message(ThreadDeadline) = 19,
    }

    /// SCHED_DEADLINE: flags as sched_setattr(2) takes them, nanoseconds.
    ThreadDeadline = "thread_deadline" {
        flags: required uint64 = 1,
        runtime: required uint64 = 2,
        deadline: required uint64 = 3,
        period: required uint64 = 4,
    }

    /// A label of SELinux for what the thread makes next: `attribute` is `exec`, `fscreate` or `keycreate`.
    ThreadLabel = "thread_label" {
        attribute: required string = 1,
        text: required string = 2,
    }

    /// The extension `network`: what is kept of network namespaces and CRIU has no place for.
    NetworksExtra = "networks_extra" {
        networks: repeated message(NetworkExtra) = 1,
    }

    /// One network namespace, by its number. `sysctls` are all below /proc/sys/net; the others are messages of netlink(7).
    NetworkExtra = "network_extra" {
        id: required uint32 = 1,
        links: repeated message(LinkExtra) = 2,
        sysctls: repeated message(NetSysctl) = 3,
        nexthops: optional bytes = 4,
        neighbours: optional bytes = 5,
        filters: optional bytes = 6,
    }

    /// One device. `kind` is the kernel's word for it, `data` and `port` are attributes of that kind and of a port of its
    /// bridge, `attributes` those of any device; `lower` the device of this namespace that it lies on, `outer` the peer or
    /// lower device in the namespace of the runtime. One that is `given` was moved in by config.json.
    LinkExtra = "link_extra" {
        ifindex: required uint32 = 1,
        kind: optional string = 2,
        data: optional bytes = 3,
        port: optional bytes = 4,
        attributes: optional bytes = 5,
        lower: optional uint32 = 6,
        outer: optional string = 7,
        given: optional bool = 8,
    }

    /// One sysctl below /proc/sys/net.
    NetSysctl = "net_sysctl" {
        name: required string = 1,
        value: required string = 2,
    }

    /// The extension `io_uring`: rings. Their descriptors are external files to CRIU, which it does not restore.
    RingsExtra = "rings_extra" {
        rings: repeated message(RingExtra) = 1,
    }

    /// One ring: the file that it is, what it was made with, what is in its memory, what was registered with it.
    /// A registered file is a descriptor of the process; `u32::MAX` is an empty place.
    RingExtra = "ring_extra" {
        id: required uint32 = 1,
        flags: required uint32 = 2,
        sq_entries: required uint32 = 3,
        cq_entries: required uint32 = 4,
        sq_off: repeated uint32 = 5,
        cq_off: repeated uint32 = 6,
        queues: required bytes = 7,
        requests: required bytes = 8,
        files: repeated uint32 = 9,
        buffers: repeated message(RingBuffer) = 10,
        status_flags: required uint32 = 11,
    }

    /// A registered buffer; none where the length is 0.
    RingBuffer = "ring_buffer" {
        address: required uint64 = 1,
        length: required uint64 = 2,
    }

    /// The NUMA policy of a mapping, as mbind(2) takes it. A process's are with its leader.
    MappingPolicy = "mapping_policy" {
        start: required uint64 = 1,
        end: required uint64 = 2,
        mode: required uint32 = 3,
        nodes: optional bytes = 4,
    }

    /// Syscall user dispatch: the range of addresses as the kernel tells it by ptrace(2).
    ThreadDispatch = "thread_dispatch" {
        selector: required uint64 = 1,
        offset: required uint64 = 2,
        length: required uint64 = 3,
    }

    /// A way in which the kernel treats a thread; `task/modes` has the numbers.
    ThreadMode = "thread_mode" {
        number: required uint32 = 1,
        value: required uint32 = 2,
    }

    /// A component of the xsave area by its number in the processor's manual.
    XstateComponent = "xstate_component" {
        number: required uint32 = 1,
        data: required bytes = 2,
    }
}
