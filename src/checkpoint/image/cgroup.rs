//! Control groups: which groups tasks were in, and what the groups were set to.

use crate::checkpoint::image::record::records;

records! {
    /// Owner and mode of a control group directory or of one of its files.
    CgroupPerms = "cgroup_perms" {
        mode: required uint32 = 1,
        uid: required uint32 = 2,
        gid: required uint32 = 3,
    }

    /// One file of a control group and what it said.
    CgroupPropEntry = "cgroup_prop_entry" {
        name: required string = 1,
        value: required string = 2,
        perms: optional message(CgroupPerms) = 3,
    }

    /// A control group with its properties and the groups made inside it.
    CgroupDirEntry = "cgroup_dir_entry" {
        dir_name: required string = 1,
        children: repeated message(CgroupDirEntry) = 2,
        properties: repeated message(CgroupPropEntry) = 3,
        dir_perms: optional message(CgroupPerms) = 4,
    }

    /// A hierarchy: the controllers mounted together (one empty name for v2) and its groups.
    CgControllerEntry = "cg_controller_entry" {
        cnames: repeated string = 1,
        dirs: repeated message(CgroupDirEntry) = 2,
        is_threaded: optional bool = 3,
    }

    /// Membership in one hierarchy: `name` is the controllers, `path` the group; the first `cgns_prefix`
    /// bytes of the path are the root of the cgroup namespace.
    CgMemberEntry = "cg_member_entry" {
        name: required string = 1,
        path: required string = 2,
        cgns_prefix: optional uint32 = 3,
    }

    /// A set of memberships that tasks share; they refer to it by `id`.
    CgSetEntry = "cg_set_entry" {
        id: required uint32 = 1,
        ctls: repeated message(CgMemberEntry) = 2,
    }

    /// cgroup.img: every set of memberships, every hierarchy.
    CgroupEntry = "cgroup_entry" {
        sets: repeated message(CgSetEntry) = 1,
        controllers: repeated message(CgControllerEntry) = 2,
    }
}
