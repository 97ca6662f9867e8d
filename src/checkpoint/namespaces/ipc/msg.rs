//! Message queues.

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{IpcMsg, IpcMsgEntry};
use crate::checkpoint::model::Messages;
use crate::sys::sysv;

pub(super) fn dump() -> Result<Vec<(IpcMsgEntry, Messages)>> {
    let queues = sysv::queues().during("cannot list the message queues", || "msgctl(_, MSG_STAT)".into())?;
    queues.iter().map(one).collect()
}

fn one(queue: &sysv::Queue) -> Result<(IpcMsgEntry, Messages)> {
    let id = queue.id;
    let large = |_| Error::new(format!("the message queue {id} is too large"));
    // No message is larger than its queue was, which may have been made smaller since.
    let max = super::var::number("/proc/sys/kernel/msgmax")?.max(queue.capacity);
    let max = usize::try_from(max).unwrap_or(usize::MAX).min(1 << 27);
    let mut messages = Vec::new();
    for at in 0..queue.messages {
        let (kind, text) = sysv::peek(id, at, max)
            .during("cannot read the message queue", || format!("msgrcv({id}, _, {max}, {at}, MSG_COPY)"))?;
        let msize = u32::try_from(text.len()).map_err(large)?;
        messages.push((IpcMsg { mtype: kind.cast_unsigned(), msize }, text));
    }
    let entry = IpcMsgEntry {
        desc: super::describe(id, &queue.perm),
        qbytes: u32::try_from(queue.capacity).map_err(large)?,
        qnum: u32::try_from(queue.messages).map_err(large)?,
    };
    Ok((entry, messages))
}

pub(super) fn restore(queues: &[(IpcMsgEntry, Messages)]) -> Result<()> {
    for (queue, messages) in queues {
        let id = super::make(&queue.desc, "msg", |perm| {
            sysv::created_by(perm.cuid, perm.cgid, || sysv::make_queue(perm))
        })?;
        let what = format!("cannot fill the message queue {id}");
        let perm = super::perm(&queue.desc);
        let capacity = |bytes: u64| {
            sysv::own_queue(id, &perm, bytes)
                .during(&what, || format!("msgctl({id}, IPC_SET, qbytes {bytes})"))
        };
        let default = super::var::number("/proc/sys/kernel/msgmnb")?;
        let wanted = u64::from(queue.qbytes);
        if wanted > default {
            capacity(wanted)?;
        }
        for (message, text) in messages {
            sysv::send(id, message.mtype.cast_signed(), text)
                .during(&what, || format!("msgsnd({id}, _, {}, IPC_NOWAIT)", text.len()))?;
        }
        // Last: the queue may hold more than it takes by now.
        capacity(wanted)?;
    }
    Ok(())
}
