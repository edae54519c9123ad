//go:build e2e

package cri

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// An ociImage is one of a single layer, by the digests of its parts (image-spec's manifest.md and image-layout.md).
type ociImage struct {
	blobs    map[string][]byte
	manifest descriptor
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

func (i *ociImage) add(mediaType string, content []byte) descriptor {
	d := descriptor{MediaType: mediaType, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(content)), Size: len(content)}
	i.blobs[d.Digest] = content
	return d
}

// newImage has a single file of that many bytes.
func newImage(t *testing.T, bytes int, compressed bool) *ociImage {
	t.Helper()
	i := &ociImage{blobs: map[string][]byte{}}
	layer := archive(t, map[string][]byte{"large": make([]byte, bytes)})
	config := map[string]any{
		"architecture": "amd64", "os": "linux",
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	}
	mediaType := "application/vnd.oci.image.layer.v1.tar"
	if compressed {
		layer, mediaType = zip(t, layer), mediaType+"+gzip"
	}
	const manifest = "application/vnd.oci.image.manifest.v1+json"
	i.manifest = i.add(manifest, encode(t, map[string]any{
		"schemaVersion": 2, "mediaType": manifest,
		"config": i.add("application/vnd.oci.image.config.v1+json", encode(t, config)),
		"layers": []descriptor{i.add(mediaType, layer)},
	}))
	return i
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func zip(t *testing.T, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(content)
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func archive(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))})
		if err == nil {
			_, err = w.Write(content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// file writes the image as an archive that can be imported.
func (i *ociImage) file(t *testing.T, reference string) string {
	t.Helper()
	manifest := i.manifest
	manifest.Annotations = map[string]string{"io.containerd.image.name": reference}
	files := map[string][]byte{
		"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`),
		"index.json": encode(t, map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}}),
	}
	for digest, content := range i.blobs {
		files["blobs/"+strings.Replace(digest, ":", "/", 1)] = content
	}
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(file, archive(t, files), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// serve is a registry, at the place where the node looks for all of them, that has the image by every name.
func (i *ociImage) serve(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:5000")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		digest := path.Base(r.URL.Path)
		if strings.Contains(r.URL.Path, "/manifests/") {
			digest = i.manifest.Digest
			w.Header().Set("Content-Type", i.manifest.MediaType)
		}
		content, ok := i.blobs[digest]
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.Header().Set("Docker-Content-Digest", digest)
		if r.Method != http.MethodHead {
			_, _ = w.Write(content) // the client may have had enough
		}
	})}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
}

// smallDisk mounts a file system of so many bytes until the end of the test.
func smallDisk(t *testing.T, bytes int) (dir string) {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	node.Tmpfs(t, dir, fmt.Sprint("mode=711,size=", bytes))
	return dir
}

func available(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

// An image that containerd's disk has no room for, packed or unpacked: who pulls or imports it is told so, nothing is left of it, and
// pods go on. (ctr images import --local is a client that keeps an image which it could not unpack.)
func TestImageTooLarge(t *testing.T) {
	const disk, size, reference = 64 << 20, 66 << 20, "docker.io/microvm/large:latest"
	dir := smallDisk(t, disk)
	n := pods.New(t, filepath.Join(dir, "s"))
	c := n.Pod(t).Run(t)
	for name, compressed := range map[string]bool{"packed": false, "unpacked": true} {
		image := newImage(t, size, compressed)
		for how, get := range map[string]func(t *testing.T) node.Result{
			"pull": func(t *testing.T) node.Result {
				image.serve(t)
				return n.Crictl(t, "pull", reference)
			},
			"import": func(t *testing.T) node.Result { return n.Ctr(t, "images", "import", image.file(t, reference)) },
		} {
			t.Run(how+" "+name, func(t *testing.T) {
				before, content := available(t, dir), n.MustCtr(t, "content", "ls", "-q").Stdout
				get(t).WantError(t, "no space left on device")
				r, err := n.Images.ImageStatus(n.Context(t), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: reference}})
				if err != nil || r.Image != nil {
					t.Errorf("CRI has %v, %v", r.GetImage(), err)
				}
				n.Collect(t)
				if now := n.MustCtr(t, "content", "ls", "-q").Stdout; now != content {
					t.Errorf("content is left: %s", now)
				}
				// Database and log grow.
				if now := available(t, dir); now < before-1<<20 {
					t.Errorf("%d bytes were available, now %d", before, now)
				}
			})
		}
	}
	c.Get(t, "true")
	n.Pod(t).Run(t).Get(t, "true")
}
