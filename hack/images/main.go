// Command images wraps the tar of a root file system as a container image in a docker-archive, which `ctr images import`
// and `docker load` take without a registry.
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	reference := flag.String("name", "", "the image's reference")
	layer := flag.String("layer", "", "uncompressed tar of the root file system")
	entrypoint := flag.String("entrypoint", "", "entry point, words separated by spaces")
	command := flag.String("cmd", "sh", "default command, words separated by spaces")
	output := flag.String("o", "", "docker-archive to write")
	flag.Parse()
	if err := write(*reference, *layer, strings.Fields(*entrypoint), strings.Fields(*command), *output); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func write(reference, layer string, entrypoint, command []string, output string) error {
	tag, err := name.NewTag(reference, name.StrictValidation)
	if err != nil {
		return fmt.Errorf("image reference: %w", err)
	}
	contents, err := os.ReadFile(layer)
	if err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	// The layer stays uncompressed: the archive never crosses a network, and unpacking gzip is what takes longest when
	// an image is imported in the emulated machine.
	image, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.DockerManifestSchema2),
		static.NewLayer(contents, types.DockerUncompressedLayer))
	if err != nil {
		return fmt.Errorf("append layer: %w", err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		return fmt.Errorf("image configuration: %w", err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	config.Config.Entrypoint, config.Config.Cmd = entrypoint, command
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return fmt.Errorf("image configuration: %w", err)
	}
	if err := tarball.WriteToFile(output, tag, image); err != nil {
		return fmt.Errorf("write %s: %w", output, err)
	}
	return nil
}
