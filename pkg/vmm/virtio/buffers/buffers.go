// Package buffers works on lists of buffers as if each were one: those of a
// chain, which a driver may cut as it likes. Guest memory is copied, or sliced,
// but not looked at.
package buffers

// Len is the number of bytes in all of them.
func Len(buffers [][]byte) uint64 {
	n := uint64(0)
	for _, b := range buffers {
		n += uint64(len(b))
	}
	return n
}

// CopyFrom fills p from the bytes that start at off, and returns how many there
// were.
func CopyFrom(buffers [][]byte, p []byte, off uint64) int {
	n := 0
	for _, b := range buffers {
		if off >= uint64(len(b)) {
			off -= uint64(len(b))
			continue
		}
		n += copy(p[n:], b[off:])
		off = 0
		if n == len(p) {
			break
		}
	}
	return n
}

// CopyTo writes p to the bytes that start at off, and returns how many found
// room.
func CopyTo(buffers [][]byte, p []byte, off uint64) int {
	n := 0
	for _, b := range buffers {
		if off >= uint64(len(b)) {
			off -= uint64(len(b))
			continue
		}
		n += copy(b[off:], p[n:])
		off = 0
		if n == len(p) {
			break
		}
	}
	return n
}

// Slice appends to dst the parts that hold the n bytes from off on, as far as
// there are so many. None of them is empty.
func Slice(dst, buffers [][]byte, off, n uint64) [][]byte {
	for _, b := range buffers {
		if n == 0 {
			break
		}
		if off >= uint64(len(b)) {
			off -= uint64(len(b))
			continue
		}
		b = b[off:]
		off = 0
		b = b[:min(uint64(len(b)), n)]
		n -= uint64(len(b))
		dst = append(dst, b)
	}
	return dst
}

// Skip drops the first n bytes, in place, and empty buffers before what is left.
func Skip(buffers [][]byte, n uint64) [][]byte {
	for len(buffers) > 0 && n >= uint64(len(buffers[0])) {
		n -= uint64(len(buffers[0]))
		buffers = buffers[1:]
	}
	if n > 0 && len(buffers) > 0 {
		buffers[0] = buffers[0][n:]
	}
	return buffers
}
