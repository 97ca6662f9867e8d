//! What CRIU writes of control groups, in the shape that ours have.
//!
//! ```text
//!   ours    top "/x", the container's own group          └─ "a" ─ "b"
//!   CRIU's  top "x/a", the outermost that somebody is in  └─ "b"        no slash; "x" is what /proc/PID/cgroup ends in
//! ```
//!
//! Which group is the container's own is told by the namespace's root, or else by what most hierarchies end in: whoever
//! makes a group inside does not do so in all of them.

use std::collections::BTreeMap;

use crate::checkpoint::image::{CgControllerEntry, CgroupDirEntry, CgroupEntry};

/// Gives every hierarchy one top, which is the container's own group.
pub fn rooted(mut entry: CgroupEntry) -> CgroupEntry {
    let usual = usual_end(&entry.controllers);
    for controller in &mut entry.controllers {
        let name = controller.cnames.join(",");
        let members = entry.sets.iter().flat_map(|set| &set.ctls).filter(|member| member.name == name);
        let mut namespaces = members.filter_map(|m| m.path.get(..usize::try_from(m.cgns_prefix?).ok()?));
        let Some(first) = controller.dirs.first().map(|top| format!("/{}", top.dir_name)) else { continue };
        let base = match namespaces.next() {
            Some(root) => root.to_owned(),
            None => up_to(&first, usual.as_deref()).unwrap_or(first),
        };
        let mut own = CgroupDirEntry { dir_name: base.clone(), ..CgroupDirEntry::default() };
        for top in std::mem::take(&mut controller.dirs) {
            let path = format!("/{}", top.dir_name);
            let Some(rest) = path.strip_prefix(&base) else { continue };
            let rest: Vec<String> =
                rest.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect();
            hang(&mut own, &rest, top);
        }
        controller.dirs.push(own);
    }
    entry
}

/// What the tops of most hierarchies end in.
fn usual_end(controllers: &[CgControllerEntry]) -> Option<String> {
    let mut ends = BTreeMap::<&str, usize>::new();
    for top in controllers.iter().filter_map(|c| c.dirs.first()) {
        *ends.entry(top.dir_name.rsplit('/').next().unwrap_or_default()).or_default() += 1;
    }
    let most = ends.into_iter().max_by_key(|(_, count)| *count)?;
    (most.1 > 1).then(|| most.0.to_owned())
}

/// The beginning of a path that ends in this part.
fn up_to(path: &str, part: Option<&str>) -> Option<String> {
    let part = part?;
    let parts: Vec<&str> = path.split('/').collect();
    let at = parts.iter().rposition(|p| *p == part)?;
    Some(parts[..=at].join("/"))
}

/// Puts a group below another one; what lies between is made.
fn hang(below: &mut CgroupDirEntry, rest: &[String], group: CgroupDirEntry) {
    let Some((name, deeper)) = rest.split_first() else {
        let children = std::mem::take(&mut below.children);
        *below = CgroupDirEntry { dir_name: std::mem::take(&mut below.dir_name), ..group };
        below.children.extend(children);
        return;
    };
    let at = below.children.iter().position(|child| child.dir_name == *name).unwrap_or_else(|| {
        below.children.push(CgroupDirEntry { dir_name: name.clone(), ..CgroupDirEntry::default() });
        below.children.len() - 1
    });
    hang(&mut below.children[at], deeper, group);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::{CgMemberEntry, CgSetEntry, CgroupPropEntry};

    fn dir(name: &str, children: Vec<CgroupDirEntry>) -> CgroupDirEntry {
        let property = CgroupPropEntry { name: "p".into(), value: name.into(), perms: None };
        CgroupDirEntry { dir_name: name.into(), children, properties: vec![property], dir_perms: None }
    }

    fn hierarchy(name: &str, dirs: Vec<CgroupDirEntry>) -> CgControllerEntry {
        CgControllerEntry { cnames: vec![name.into()], dirs, is_threaded: None }
    }

    /// Names and depths, and whether a group has its settings.
    fn shape(dir: &CgroupDirEntry) -> String {
        let own = if dir.properties.is_empty() { "?" } else { "" };
        let children: Vec<String> = dir.children.iter().map(shape).collect();
        format!("{}{own}({})", dir.dir_name, children.join(" "))
    }

    fn shapes(entry: &CgroupEntry) -> Vec<String> {
        entry.controllers.iter().map(|c| c.dirs.iter().map(shape).collect()).collect()
    }

    #[test]
    fn the_containers_own_group_is_what_most_hierarchies_end_in() {
        let controllers = vec![
            hierarchy("pids", vec![dir("x/a", vec![dir("b", vec![])])]),
            hierarchy("cpu", vec![dir("x", vec![dir("slow", vec![])])]),
            hierarchy("memory", vec![dir("deep/er/x", vec![])]),
        ];
        let entry = rooted(CgroupEntry { sets: vec![], controllers });
        assert_eq!(shapes(&entry), ["/x?(a(b()))", "/x(slow())", "/deep/er/x()"]);
    }

    #[test]
    fn a_namespace_tells_its_root() {
        let member = CgMemberEntry { name: String::new(), path: "/x/own".into(), cgns_prefix: Some(2) };
        let sets = vec![CgSetEntry { id: 2, ctls: vec![member] }];
        let dirs =
            vec![dir("x/own", vec![dir("other", vec![])]), dir("x/own/other/c", vec![]), dir("y", vec![])];
        let entry = rooted(CgroupEntry { sets, controllers: vec![hierarchy("", dirs)] });
        assert_eq!(shapes(&entry), ["/x?(own(other(c())))"]);
    }

    #[test]
    fn one_hierarchy_alone_is_taken_at_its_word() {
        let entry =
            rooted(CgroupEntry { sets: vec![], controllers: vec![hierarchy("", vec![dir("x/a", vec![])])] });
        assert_eq!(shapes(&entry), ["/x/a()"]);
    }
}
