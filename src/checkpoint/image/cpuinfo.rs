//! cpuinfo.img: the processor the images were made on.

use crate::checkpoint::image::record::records;

/// Maker of an x86 processor.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum CpuVendor {
    Unknown = 0,
    Intel = 1,
    Amd = 2,
}

/// Byte order of a ppc64 processor.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Endianness {
    Bigendian = 0,
    Littleendian = 1,
}

records! {
    /// Model and features of an x86 processor.
    CpuinfoX86Entry = "cpuinfo_x86_entry" {
        vendor_id: required enumeration(CpuVendor) = 1,
        cpu_family: required uint32 = 2,
        model: required uint32 = 3,
        stepping: required uint32 = 4,
        capability_ver: required uint32 = 5,
        capability: repeated uint32 = 6,
        model_id: optional string = 7,
        xfeatures_mask: optional uint64 = 8,
        xsave_size: optional uint32 = 9,
        xsave_size_max: optional uint32 = 10,
    }

    /// Features of a ppc64 processor.
    CpuinfoPpc64Entry = "cpuinfo_ppc64_entry" {
        endian: required enumeration(Endianness) = 1,
        hwcap: repeated uint64 = 2,
    }

    /// Features of an s390 processor.
    CpuinfoS390Entry = "cpuinfo_s390_entry" {
        hwcap: repeated uint64 = 2,
    }

    /// The processors of the machine, one record where all are alike.
    CpuinfoEntry = "cpuinfo_entry" {
        x86_entry: repeated message(CpuinfoX86Entry) = 1,
        ppc64_entry: repeated message(CpuinfoPpc64Entry) = 2,
        s390_entry: repeated message(CpuinfoS390Entry) = 3,
    }
}
