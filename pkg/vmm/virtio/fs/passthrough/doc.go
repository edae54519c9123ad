// Package passthrough is a FUSE file server that shows a directory of the host
// to a guest it does not trust. It knows nothing of virtqueues: a Server is a
// function from the buffers of a request to those of its reply.
//
// # What the guest can reach
//
// Everything below the shared root, including what is mounted there at any
// time, and nothing else:
//
//   - A node is an O_PATH|O_NOFOLLOW descriptor, or the way to one: its parent
//     and its name there. Names are single components, never empty, ".", ".."
//     or with a slash. They are resolved one at a time, by openat2 with
//     RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS, or by an
//     *at system call that treats its last component as a name. No symbolic link
//     is ever followed on the host; the guest reads links and follows them
//     itself.
//   - Only regular files and directories are opened, through their descriptor's
//     entry in /proc/self/fd, so what is opened is what was looked up. FIFOs,
//     sockets and devices are the guest kernel's own business.
//   - Node ids and handles are numbers in tables and are never used again. One
//     that is unknown or was given back is ESTALE or EBADF.
//   - What a guest makes the server hold is bounded: nodes, descriptors, handles,
//     lock owners and lock waits (see Limits), and the buffers of one request.
//
// The guest's kernel checks permissions (virtiofs mounts with
// default_permissions). The server does not: whoever drives the guest's kernel
// has the whole share, as the pod's own container would. A read-only share is
// read-only here.
//
// # Capabilities
//
// As root everything works. A server with fewer capabilities still serves what
// they are not needed for; the rest is EPERM or EACCES:
//
//	CAP_DAC_OVERRIDE     files and directories the server's uid may not access
//	CAP_DAC_READ_SEARCH  the same, for a read-only share
//	CAP_CHOWN            new files of callers with other ids; SETATTR of owner
//	CAP_FOWNER           SETATTR of mode and times, xattrs, sticky directories,
//	                     O_NOATIME, hard links to files of others
//	CAP_FSETID           set-id bits on files of other groups. Without it the host
//	                     clears them on each write, even of privileged callers
//	CAP_MKNOD            MKNOD of devices other than overlay whiteouts
//	CAP_SYS_ADMIN        trusted.* xattrs
//	CAP_SETFCAP          security.capability xattrs
//	CAP_SETUID, SETGID   making names through mounts that map ids
//	CAP_SYS_RESOURCE     reserved blocks of the host's file system
//
// Which of them a VMM has is in package jail. Every system call that a server makes
// is in Syscalls.
//
// The server needs unshare(CLONE_FS), which needs no capability, and a
// descriptor of /proc/self/fd, but no mounted /proc.
//
// # Caching
//
// The host and other guests change shares too. The kernel keeps names and
// attributes for Config.EntryTimeout and AttrTimeout, names that do not exist
// not at all, and file contents until size or modification time change
// (AUTO_INVAL_DATA): a change made elsewhere shows after AttrTimeout at the
// latest. Writes go through to the host at once (no WRITEBACK_CACHE), except
// those made through a shared mapping, which the guest's kernel writes back.
//
// # Ownership
//
// New nodes are made by the server and then given to the caller (fchownat).
// Group inheritance of set-gid directories, default ACLs and the umask are the
// host kernel's work: creation runs on threads that have the caller's umask.
// That is why CREATE_SUPP_GROUP and SECURITY_CTX are not negotiated.
package passthrough
