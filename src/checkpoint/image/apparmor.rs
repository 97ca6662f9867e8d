//! AppArmor: the policies that were loaded for the container, by namespace.

use crate::checkpoint::image::record::records;

records! {
    /// One compiled policy.
    AaPolicy = "aa_policy" {
        name: required string = 1,
        blob: required bytes = 2,
    }

    /// The policies of one AppArmor namespace, and those nested in it.
    AaNamespace = "aa_namespace" {
        name: required string = 1,
        policies: repeated message(AaPolicy) = 2,
        namespaces: repeated message(AaNamespace) = 3,
    }

    /// apparmor.img: the namespaces of policies.
    ApparmorEntry = "apparmor_entry" {
        namespaces: repeated message(AaNamespace) = 1,
    }
}
