package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// wanted is what is negotiated if the guest's kernel offers it. Not wanted:
//
//   - WRITEBACK_CACHE: what a container has written must not be lost with its
//     VM, and others see it at once.
//   - EXPORT_SUPPORT: it is LOOKUP of "." and "..". NO_EXPORT_SUPPORT lets the
//     kernel say so, rather than hand out file handles that may not work later.
//   - SECURITY_CTX: labels are the host's, see xattr.go.
//   - CREATE_SUPP_GROUP: for servers that create with the caller's ids.
//   - ASYNC_DIO: the parts of a direct write would come all at once, and with
//     O_APPEND end up in any order; only the host knows where the end is.
const wanted = fuse.AsyncRead | fuse.PosixLocks | fuse.AtomicOTrunc | fuse.BigWrites | fuse.DontMask |
	fuse.FlockLocks | fuse.AutoInvalData | fuse.DoReaddirplus | fuse.ReaddirplusAuto |
	fuse.ParallelDirops | fuse.PosixACL | fuse.MaxPages | fuse.CacheSymlinks | fuse.Submounts |
	fuse.HandleKillprivV2 | fuse.SetxattrExt | fuse.InitExt | fuse.NoExportSupport | fuse.AllowIDMap

func (s *Server) init(r *request) unix.Errno {
	in := fuse.DecodeInitIn(r.args)
	if in.Major > fuse.MajorVersion {
		// The kernel shall ask again with this version.
		r.reply = fuse.InitOut{Major: fuse.MajorVersion, Minor: fuse.MinorVersion}.Append(r.reply)
		return 0
	}
	if in.Major < fuse.MajorVersion || in.Minor < fuse.OldestMinor {
		return unix.EPROTO
	}
	flags := in.Flags & wanted
	s.session.Store(&session{flags: flags})
	r.reply = fuse.InitOut{
		Major:        fuse.MajorVersion,
		Minor:        min(in.Minor, fuse.MinorVersion),
		MaxReadahead: in.MaxReadahead,
		Flags:        flags,
		// Readahead and other requests that nobody waits for.
		MaxBackground:       64,
		CongestionThreshold: 48,
		MaxWrite:            maxWrite,
		TimeGran:            1,
		MaxPages:            maxWrite / 4096,
	}.Append(r.reply)
	return 0
}

// destroy answers the unmount: the kernel keeps nothing it was told.
func (s *Server) destroy(*request) unix.Errno {
	s.release()
	s.session.Store(nil)
	return 0
}
