//go:build e2e

package chaos

import (
	"bytes"
	"fmt"
	"strings"
)

// plot draws, one below the other, what each process had of each resource after each cycle: SVG 1.1. Every panel begins at 0.
func plot(names []string, series map[string][]usage) []byte {
	const (
		width, height     = 640, 150 // of a panel's lines
		left, top, bottom = 70, 40, 30
		step              = top + height + bottom
	)
	colours := []string{"#1f77b4", "#d62728", "#2ca02c"}
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n",
		left+width+20, step*len(usageNames))
	for panel, title := range usageNames {
		most, cycles := 1, 1
		for _, name := range names {
			for _, u := range series[name] {
				most = max(most, u.values()[panel])
			}
			cycles = max(cycles, len(series[name]))
		}
		x := func(i int) float64 { return left + float64(width*i)/float64(max(cycles-1, 1)) }
		y := func(v int) float64 { return float64(step*panel+top+height) - float64(height*v)/float64(most) }
		fmt.Fprintf(&b, `<text x="%d" y="%d">%s after each pod</text>`+"\n", left, step*panel+top-24, title)
		fmt.Fprintf(&b, `<path d="M%d %.1fV%.1fH%d" fill="none" stroke="#888"/>`+"\n", left, y(most), y(0), left+width)
		fmt.Fprintf(&b, `<text x="%d" y="%.1f" text-anchor="end">%d</text><text x="%d" y="%.1f" text-anchor="end">0</text>`+"\n",
			left-4, y(most)+4, most, left-4, y(0)+4)
		fmt.Fprintf(&b, `<text x="%d" y="%.1f" text-anchor="end">%d</text>`+"\n", left+width, y(0)+16, cycles)
		for i, name := range names {
			colour := colours[i%len(colours)]
			var points strings.Builder
			for j, u := range series[name] {
				fmt.Fprintf(&points, "%.1f,%.1f ", x(j), y(u.values()[panel]))
			}
			fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s"/>`+"\n", strings.TrimSpace(points.String()), colour)
			fmt.Fprintf(&b, `<text x="%d" y="%d" fill="%s">%s</text>`+"\n", left+90*i, step*panel+top-8, colour, name)
		}
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
